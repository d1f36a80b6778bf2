"""Random models of published shapes, for benches that need no trained weights."""
