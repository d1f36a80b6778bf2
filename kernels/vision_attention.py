"""Bidirectional attention of a vision tower over packed pictures, and what the reducers ask of it.

No function here ever holds a [heads, N, N] buffer: attention goes through tiles, in C++ on the CPU and else in torch's
own kernel; the rows a reducer asks for are computed alone, and column means stream over blocks of queries.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from foveate.kernels.attention import packed_heads
from foveate.kernels.native import kernels

_QUERY_BLOCK = 64  # rows of scores alive at once in `received`


def vision_attention(q: Tensor, k: Tensor, v: Tensor, cu_lengths: Sequence[int], scale: float) -> Tensor:
    """Attend within each segment, every row to every row.

    Args:
        q, k, v: [n, heads, d]; views into fused rows are read as they are.
        cu_lengths: [n_segments + 1] ascending from 0 to n; a segment is a picture, or a window of one.

    Returns:
        [n, heads, d].
    """
    assert cu_lengths[0] == 0 and cu_lengths[-1] == q.shape[0], "segments cover all rows"
    compiled = kernels()
    if compiled is None:
        return reference(q, k, v, cu_lengths, scale)
    if q.device.type == "cpu" and q.dtype == k.dtype == v.dtype == torch.float32:
        return _compiled(compiled, q, k, v, cu_lengths, scale)
    return _grouped(q, k, v, cu_lengths, scale)


def reference(q: Tensor, k: Tensor, v: Tensor, cu_lengths: Sequence[int], scale: float) -> Tensor:
    """The definition: softmax in float32, one segment after the other."""
    out = torch.empty_like(q)
    for start, end in zip(cu_lengths[:-1], cu_lengths[1:], strict=True):
        scores = torch.einsum("mhd,lhd->hml", q[start:end].float(), k[start:end].float()) * scale
        out[start:end] = torch.einsum("hml,lhd->mhd", scores.softmax(-1), v[start:end].float()).to(q.dtype)
    return out


def _compiled(built: ModuleType, q: Tensor, k: Tensor, v: Tensor, cu_lengths: Sequence[int], scale: float) -> Tensor:
    q, k, v = (packed_heads(x) for x in (q, k, v))
    assert q.shape == k.shape == v.shape, "every row has a query, a key and a value"
    cu = torch.tensor(cu_lengths, dtype=torch.int32)
    out = torch.empty(q.shape)
    built.vision_attention(
        *(q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0)),
        *(cu.data_ptr(), out.data_ptr(), 0, len(cu) - 1, *q.shape[1:], scale),
    )
    return out


def _grouped(q: Tensor, k: Tensor, v: Tensor, cu_lengths: Sequence[int], scale: float) -> Tensor:
    """Segments of equal length go through one call: a 2.5-VL picture has hundreds of windows of at most four sizes."""
    starts: dict[int, list[int]] = {}
    for start, end in zip(cu_lengths[:-1], cu_lengths[1:], strict=True):
        starts.setdefault(end - start, []).append(start)
    if len(starts) == 1:
        (length,) = starts
        return _attend(q, k, v, length, scale)
    out = torch.empty_like(q)
    for length, firsts in starts.items():
        rows = torch.tensor(firsts, device=q.device)[:, None] + torch.arange(length, device=q.device)
        rows = rows.flatten()
        out[rows] = _attend(q[rows], k[rows], v[rows], length, scale)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, length: int, scale: float) -> Tensor:
    q, k, v = (x.reshape(-1, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1)


def attention_rows(q_rows: Tensor, k: Tensor, scale: float) -> Tensor:
    """Softmax attention of a few queries to all keys of one picture, averaged over heads.

    Args:
        q_rows: [r, heads, d].
        k: [n, heads, d].

    Returns:
        float32 [r, n]; each row sums to 1.
    """
    scores = torch.einsum("rhd,nhd->hrn", q_rows.float(), k.float()) * scale
    return scores.softmax(-1).mean(0)


def received(q: Tensor, k: Tensor, cu_lengths: Sequence[int], scale: float) -> Tensor:
    """Attention each row receives: the mean over all queries of its segment and over heads.

    Args:
        q, k: [n, heads, d] packed.
        cu_lengths: [n_segments + 1].

    Returns:
        float32 [n]; each segment sums to 1.
    """
    out = torch.zeros(q.shape[0], dtype=torch.float32, device=q.device)
    for start, end in zip(cu_lengths[:-1], cu_lengths[1:], strict=True):
        for first in range(start, end, _QUERY_BLOCK):
            rows = q[first : min(first + _QUERY_BLOCK, end)]
            out[start:end] += attention_rows(rows, k[start:end], scale).sum(0)
        out[start:end] /= end - start
    return out
