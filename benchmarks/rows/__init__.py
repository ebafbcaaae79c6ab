"""The code behind the rows of `benchmarks/registry.py`, one module for each kind of work."""
