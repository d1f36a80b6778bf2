"""Tensors in, tensors out: each file here is one operation, with its definition in plain torch, `reference`."""
