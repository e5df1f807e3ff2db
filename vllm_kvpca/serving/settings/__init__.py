"""The options of an engine, and what they cannot be combined with."""
