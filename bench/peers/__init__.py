"""Foveate beside other servers, on the same random models: `python -m bench.peers`."""
