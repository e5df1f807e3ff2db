"""Every place where vLLM is changed from outside: one file per concern, `catalogue` lists them.

vLLM 0.32 and 0.33 have all of these names with the same signatures, so there is one file for both.
A version that differs gets its own `Change` in the file of its concern.
"""
