"""A run of decoder layers in one C++ call: the kernels of the operations in the same order, hence the same bits.

Between two kernels memory does not wait for Python.
"""

import torch
from torch import Tensor

from foveate.kernels.cpu.attention import STORED
from foveate.kernels.cpu.linear import verified
from foveate.kernels.decoder import MOST_ROWS, Cache, Layers, reference

TAKES = ((torch.float32,), STORED)  # rows, the pages of the cache


def run(rows: Tensor, cos: Tensor, sin: Tensor, layers: Layers, cache: Cache, which: range) -> Tensor:
    """As the reference, which runs for more than `MOST_ROWS` rows."""
    if len(rows) > MOST_ROWS:
        return reference(rows, cos, sin, layers, cache, which)
    (n, hidden), host, slots = rows.shape, cache.batch.host, cache.slots
    tables, n_seqs, block_tokens = host.block_tables, len(host.kv_lengths), cache.keys.shape[1]
    assert rows.dtype == cos.dtype == sin.dtype == torch.float32, "activations are float32"
    assert cos.shape == sin.shape == (n, layers.head_dim // 2), "an angle for each pair of a row's heads"
    assert cache.keys.shape == cache.values.shape and cache.keys.dtype == cache.values.dtype, "one store holds both"
    assert cache.keys.shape[2:] == (layers.n_kv_heads, layers.head_dim), "the store has the heads of the model"
    assert cache.keys.is_contiguous() and cache.values.is_contiguous(), "pages are addressed as one flat run of slots"
    assert slots.dtype == torch.int64 and slots.shape == (len(layers.layers), n), "a slot for every layer and row"
    assert slots.stride(1) == 1, "the slots of a layer lie side by side"
    assert tables.shape[:2] == (len(layers.layers), n_seqs), "tables for every layer and sequence"
    assert int(host.cu_queries[-1]) == n and host.longest <= tables.shape[2] * block_tokens, "the tables hold every key"
    rows, cos, sin = rows.clone(memory_format=torch.contiguous_format), cos.contiguous(), sin.contiguous()
    words = [
        *(rows.data_ptr(), n, hidden, cos.data_ptr(), sin.data_ptr()),
        *(layers.words[which.start :].data_ptr(), len(which), layers.n_heads, layers.n_kv_heads, layers.head_dim),
        *(cache.keys.data_ptr(), cache.values.data_ptr(), cache.keys.dtype == torch.bfloat16, block_tokens),
        *(host.cu_queries.data_ptr(), host.kv_lengths.data_ptr(), tables[which.start :].data_ptr()),
        *(n_seqs, tables.stride(1), tables.stride(0), slots[which.start :].data_ptr(), slots.stride(0)),
    ]
    verified().run_decoder(words, layers.eps, cache.scale)
    return rows
