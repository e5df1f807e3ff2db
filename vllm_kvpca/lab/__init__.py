"""Measurements, and the tables, figures and pages made from them. A server needs none of it.

measurements/   one module for each kind: its run, its comparison with stock, its table rows
record.py       a result with everything needed to repeat it; tables and figures know no more
engine.py       one engine per process; gpu_engines.py: several, for the benches
"""
