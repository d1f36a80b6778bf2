"""Measurements, each printing the command that made it: `python -m bench.quality`, `python -m bench.serve`."""
