"""Functions that many methods share, each with tests: ranking, greedy selection, merging, numerics."""
