"""The paged KV cache: accounting of blocks, prefix keys, and the tensors behind them."""
