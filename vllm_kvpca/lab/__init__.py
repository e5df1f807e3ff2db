"""Measurements of the served engine. Each result is a record (record.py), each engine a process
of its own (engine.py); tables and plots are made from records alone."""
