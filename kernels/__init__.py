"""Tensors in, tensors out: one file per operation, each with its plain reference."""
