"""Pruning visual tokens inside the decoder: contract, probe, schedules. The methods are in methods/."""
