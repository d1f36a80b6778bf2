"""Measurements. Each prints the command that made it: `python -m bench.quality`, `python -m bench.serve`."""
