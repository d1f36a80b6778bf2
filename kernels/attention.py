"""Attention of packed queries over the paged KV cache: the one function every decoder layer goes through.

Keys are cached after RoPE, so the result is a function of the *set* of (key, value) pairs a query sees: blocks may lie
anywhere in the pool. The log-sum-exp is returned because sets that are attended separately (tiers, evicted parts) are
merged by it. Slots at or after a sequence's length hold garbage, perhaps NaN, and are never read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from foveate.kernels.hardware.dispatch import choose

TREE = "a tree mask is bool, new tokens x new tokens"
_MAX_SCORES = 2**26  # alive at once in `reference`: a chunk of 2048 over 32k keys would else hold many GB


@dataclass(frozen=True)
class HostBatch:
    """A batch as the CPU version reads it: int32, on the CPU; rows of the tables may lie apart."""

    cu_queries: Tensor  # [n_seqs + 1]
    kv_lengths: Tensor  # [n_seqs]
    block_tables: Tensor  # [n_seqs, max_blocks] or [n_layers, n_seqs, max_blocks]
    longest: int  # of kv_lengths

    def tables(self, layer: int) -> Tensor:
        """As `AttentionBatch.tables`."""
        return self.block_tables[layer] if self.block_tables.dim() == 3 else self.block_tables


@dataclass(frozen=True)
class AttentionBatch:
    """Where the queries and keys of each sequence are. A backend makes one for each batch, and every layer reads it.

    Sequence s has the queries [cu_queries[s], cu_queries[s + 1]), its newest tokens, and `kv_lengths[s]` keys, the new
    ones included; key j lies in block `block_tables[s, j // block_tokens]` at offset `j % block_tokens`. Tables may
    differ by layer; then a layer says which are its own.
    """

    cu_queries: Sequence[int] | Tensor  # [n_seqs + 1]
    kv_lengths: Sequence[int] | Tensor  # [n_seqs]
    block_tables: Tensor  # [n_seqs, max_blocks] or [n_layers, n_seqs, max_blocks], int32 or int64, where the blocks are

    def tables(self, layer: int) -> Tensor:
        """[n_seqs, max_blocks] of one layer."""
        return self.block_tables[layer] if self.block_tables.dim() == 3 else self.block_tables

    def spans(self) -> list[tuple[int, int, int]]:
        """(first query, end query, number of keys) of each sequence."""
        cu, lengths = _ints(self.cu_queries), _ints(self.kv_lengths)
        assert len(cu) == len(lengths) + 1, "cu_queries has one entry more than there are sequences"
        return list(zip(cu[:-1], cu[1:], lengths, strict=True))

    @cached_property
    def host(self) -> HostBatch:
        """Made and checked by the first layer that asks."""
        assert all(end - start <= length for start, end, length in self.spans()), "new tokens are among the keys"
        cu, lengths = _on_host(self.cu_queries), _on_host(self.kv_lengths)
        tables = self.block_tables.to("cpu", torch.int32)
        return HostBatch(
            cu, lengths, tables if tables.stride(-1) == 1 else tables.contiguous(), max(lengths.tolist(), default=0)
        )


def paged_attention(
    q: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    tree_mask: Sequence[Tensor | None] | None = None,
    layer: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attend each sequence's new tokens to its cached ones, which already include the new.

    Query i of a sequence with m queries and L keys sees keys j <= L - m + i. With a tree mask it sees all keys before
    L - m, and of the m new ones those its row allows.

    Args:
        q: [n_tokens, n_heads, d] packed.
        key_blocks: [n_blocks, block_tokens, n_kv_heads, d]; n_kv_heads divides n_heads (head h reads h // group).
        value_blocks: the same shape.
        batch: which queries and blocks belong to which sequence.
        scale: multiplies the dot products.
        tree_mask: per sequence a bool [m, m], row = query, True = visible (a draft tree's ancestors, itself included),
            or None for the causal rule.
        layer: whose tables of `batch` to read.

    Returns:
        out [n_tokens, n_heads, d] in the dtype of `q`, and the log-sum-exp of the scores, float32 [n_tokens, n_heads].
    """
    assert q.shape[1] % key_blocks.shape[2] == 0, "every key head serves the same number of query heads"
    version = choose(reference, q.device, q.dtype, key_blocks.dtype)
    return version(q, key_blocks, value_blocks, batch, scale, tree_mask, layer)


def reference(
    q: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    batch: AttentionBatch,
    scale: float,
    tree_mask: Sequence[Tensor | None] | None = None,
    layer: int = 0,
) -> tuple[Tensor, Tensor]:
    """The definition: softmax in float32 over the visible keys."""
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    group = q.shape[1] // key_blocks.shape[2]
    tables = batch.tables(layer)
    for s, (start, end, length) in enumerate(batch.spans()):
        m = end - start
        assert m <= length, "a sequence's new tokens are among its keys"
        k = gather(key_blocks, tables[s], length).float().repeat_interleave(group, 1)
        v = gather(value_blocks, tables[s], length).float().repeat_interleave(group, 1)
        visible = _visible(m, length, tree_mask[s] if tree_mask else None, q.device)
        step = max(1, _MAX_SCORES // (q.shape[1] * length))
        for first in range(start, end, step):
            rows = slice(first, min(first + step, end))
            scores = torch.einsum("mhd,lhd->mhl", q[rows].float(), k) * scale
            scores = scores.masked_fill(~visible[first - start : rows.stop - start, None], -torch.inf)
            lse[rows] = scores.logsumexp(-1)
            out[rows] = torch.einsum("mhl,lhd->mhd", scores.softmax(-1), v).to(q.dtype)
    return out, lse


def gather(blocks: Tensor, table: Tensor, length: int) -> Tensor:
    """The first `length` slots of a sequence, in order: [length, n_kv_heads, d]."""
    n_blocks = -(-length // blocks.shape[1])
    return blocks.index_select(0, table[:n_blocks]).flatten(0, 1)[:length]


def _visible(m: int, length: int, tree: Tensor | None, device: torch.device) -> Tensor:
    """bool [m, length]: which keys each query sees."""
    if tree is None:
        return torch.ones(m, length, dtype=torch.bool, device=device).tril_(length - m)
    assert tree.shape == (m, m) and tree.dtype == torch.bool, TREE
    return torch.cat([torch.ones(m, length - m, dtype=torch.bool, device=device), tree.to(device)], dim=1)


def _on_host(values: Sequence[int] | Tensor) -> Tensor:
    """int32, contiguous, on the CPU: the tensor itself where it is that already."""
    if isinstance(values, Tensor):
        return values.to("cpu", torch.int32).contiguous()
    return torch.tensor(values, dtype=torch.int32)


def _ints(values: Sequence[int] | Tensor) -> list[int]:
    return [int(x) for x in values.tolist()] if isinstance(values, Tensor) else list(values)
