"""Attention over the paged cache in C++: the whole batch in one call, keys in tiles, softmax as it goes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.kernels.attention import TREE, AttentionBatch, HostBatch
from foveate.kernels.cpu.layout import packed_heads
from foveate.kernels.cpu.levels import extension

STORED = (torch.float32, torch.bfloat16)  # what the blocks of the cache may hold
TAKES = ((torch.float32,), STORED)  # q, the blocks


def run(
    q: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    batch: AttentionBatch,
    scale: float,
    tree_mask: Sequence[Tensor | None] | None = None,
    layer: int = 0,
) -> tuple[Tensor, Tensor]:
    """As the reference."""
    n_blocks, block_tokens, n_kv_heads, d = key_blocks.shape
    q = packed_heads(q)
    assert value_blocks.shape == key_blocks.shape and value_blocks.dtype == key_blocks.dtype, "one store holds both"
    assert key_blocks.is_contiguous() and value_blocks.is_contiguous(), "blocks are addressed as one flat run of slots"
    host = batch.host
    n_seqs, tables = len(host.kv_lengths), host.tables(layer)
    assert len(tables) == n_seqs, "every sequence has a row of blocks"
    assert host.longest <= tables.shape[1] * block_tokens, "the tables hold every key"
    trees = _contiguous_trees(host, tree_mask) if tree_mask else []  # kept until the call returns
    masks = torch.tensor([0 if t is None else t.data_ptr() for t in trees], dtype=torch.int64) if trees else None
    out, lse = torch.empty(q.shape), torch.empty(q.shape[:2])
    extension().paged_attention(
        *(q.data_ptr(), q.stride(0), key_blocks.data_ptr(), value_blocks.data_ptr()),
        *(key_blocks.dtype == torch.bfloat16, host.cu_queries.data_ptr(), host.kv_lengths.data_ptr()),
        *(tables.data_ptr(), tables.stride(0), 0 if masks is None else masks.data_ptr()),
        *(out.data_ptr(), out.stride(0), lse.data_ptr()),
        *(n_seqs, q.shape[1], n_kv_heads, d, block_tokens, scale),
    )
    return out, lse


def _contiguous_trees(host: HostBatch, tree_mask: Sequence[Tensor | None]) -> list[Tensor | None]:
    news = host.cu_queries.diff().tolist()
    for m, tree in zip(news, tree_mask, strict=True):
        assert tree is None or (tree.shape == (m, m) and tree.dtype == torch.bool), TREE
    return [None if tree is None else tree.contiguous() for tree in tree_mask]
