"""Attention of packed queries over the paged KV cache: the one function every decoder layer goes through.

Two versions of one definition:
    reference   plain torch in float32, the definition; also what runs on CUDA for now
    _fast_cpu   per sequence: gather the blocks (a copy of whole blocks), then torch's CPU flash attention

Keys are cached after RoPE, so the result is a function of the *set* of (key, value) pairs a query sees: blocks may lie
anywhere in the pool. The log-sum-exp is returned because sets that are attended separately (tiers, evicted parts) are
merged by it. Slots at or after a sequence's length hold garbage, perhaps NaN, and are never read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.kernels.native import kernels

_MAX_SCORES = 2**26  # alive at once in `reference`: a chunk of 2048 over 32k keys would else hold many GB


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where the queries and keys of each sequence are. Filled by the runner once per step, used by every layer.

    Sequence s has the queries [cu_queries[s], cu_queries[s + 1]), its newest tokens, and `kv_lengths[s]` keys, the new
    ones included; key j lies in block `block_tables[s, j // block_tokens]` at offset `j % block_tokens`.
    """

    cu_queries: Sequence[int] | Tensor  # [n_seqs + 1]
    kv_lengths: Sequence[int] | Tensor  # [n_seqs]
    block_tables: Tensor  # [n_seqs, max_blocks] int32 or int64, on the device of the blocks

    def spans(self) -> list[tuple[int, int, int]]:
        """(first query, end query, number of keys) of each sequence."""
        cu, lengths = _ints(self.cu_queries), _ints(self.kv_lengths)
        assert len(cu) == len(lengths) + 1, "cu_queries has one entry more than there are sequences"
        return list(zip(cu[:-1], cu[1:], lengths, strict=True))


def paged_attention(
    q: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    tree_mask: Sequence[Tensor | None] | None = None,
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

    Returns:
        out [n_tokens, n_heads, d] in the dtype of `q`, and the log-sum-exp of the scores, float32 [n_tokens, n_heads].
    """
    assert q.shape[1] % key_blocks.shape[2] == 0, "every key head serves the same number of query heads"
    version = reference if kernels() is None or q.device.type != "cpu" else _fast_cpu
    return version(q, key_blocks, value_blocks, batch, scale, tree_mask)


def reference(
    q: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    batch: AttentionBatch,
    scale: float,
    tree_mask: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: softmax in float32 over the visible keys."""
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    group = q.shape[1] // key_blocks.shape[2]
    for s, (start, end, length) in enumerate(batch.spans()):
        m = end - start
        assert m <= length, "a sequence's new tokens are among its keys"
        k = _gather(key_blocks, batch.block_tables[s], length).float().repeat_interleave(group, 1)
        v = _gather(value_blocks, batch.block_tables[s], length).float().repeat_interleave(group, 1)
        visible = _visible(m, length, tree_mask[s] if tree_mask else None, q.device)
        step = max(1, _MAX_SCORES // (q.shape[1] * length))
        for first in range(start, end, step):
            rows = slice(first, min(first + step, end))
            scores = torch.einsum("mhd,lhd->mhl", q[rows].float(), k) * scale
            scores = scores.masked_fill(~visible[first - start : rows.stop - start, None], -torch.inf)
            lse[rows] = scores.logsumexp(-1)
            out[rows] = torch.einsum("mhl,lhd->mhd", scores.softmax(-1), v).to(q.dtype)
    return out, lse


def _fast_cpu(
    q: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    batch: AttentionBatch,
    scale: float,
    tree_mask: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.float32)
    for s, (start, end, length) in enumerate(batch.spans()):
        if end == start:
            continue
        k = _gather(key_blocks, batch.block_tables[s], length)
        v = _gather(value_blocks, batch.block_tables[s], length)
        tree = tree_mask[s] if tree_mask else None
        out[start:end], lse[start:end] = _attend_one(q[start:end], k, v, scale, tree)
    return out, lse


def _attend_one(q: Tensor, k: Tensor, v: Tensor, scale: float, tree: Tensor | None) -> tuple[Tensor, Tensor]:
    """One sequence, q [m, n_heads, d], k and v [L, n_kv_heads, d]: ([m, n_heads, d], float32 [m, n_heads])."""
    m, n_heads, d = q.shape
    length, n_kv_heads, _ = k.shape
    group = n_heads // n_kv_heads
    k, v = k.permute(1, 0, 2), v.permute(1, 0, 2)
    if m == 1:  # every key head becomes one small matrix product over its group: K and V are read once
        out, lse = _flash(q.view(1, n_kv_heads, group, d), k[None], v[None], scale=scale)
        return out.reshape(1, n_heads, d), lse.reshape(1, n_heads)
    grouped = q.view(m, n_kv_heads, group, d).permute(1, 2, 0, 3)  # key heads as the batch, their group as the heads
    k, v = (x[:, None].expand(n_kv_heads, group, length, d) for x in (k, v))
    causal = tree is None and m == length
    mask = None if causal else _visible(m, length, tree, q.device)
    if mask is not None:  # the CPU kernel wants an additive mask
        mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    out, lse = _flash(grouped, k, v, scale=scale, causal=causal, mask=mask)
    return out.permute(2, 0, 1, 3).reshape(m, n_heads, d), lse.permute(2, 0, 1).reshape(m, n_heads)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """torch's own CPU flash attention on [b, h, m, d]: out [b, h, m, d] and log-sum-exp float32 [b, h, m]."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )
    return out, lse


def _gather(blocks: Tensor, table: Tensor, length: int) -> Tensor:
    """The first `length` slots of a sequence, in order: [length, n_kv_heads, d]."""
    n_blocks = -(-length // blocks.shape[1])
    return blocks.index_select(0, table[:n_blocks]).flatten(0, 1)[:length]


def _visible(m: int, length: int, tree: Tensor | None, device: torch.device) -> Tensor:
    """bool [m, length]: which keys each query sees."""
    if tree is None:
        return torch.ones(m, length, dtype=torch.bool, device=device).tril_(length - m)
    assert tree.shape == (m, m) and tree.dtype == torch.bool, "a tree mask is bool, new tokens x new tokens"
    return torch.cat([torch.ones(m, length - m, dtype=torch.bool, device=device), tree.to(device)], dim=1)


def _ints(values: Sequence[int] | Tensor) -> list[int]:
    return [int(x) for x in values.tolist()] if isinstance(values, Tensor) else list(values)
