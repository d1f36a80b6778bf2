"""CPU time of a decode step besides the model: `python -m bench.host`."""
