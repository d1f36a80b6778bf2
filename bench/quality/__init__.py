"""Exact match of every method at every budget: `python -m bench.quality`."""
