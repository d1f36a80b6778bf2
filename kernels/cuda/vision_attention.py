"""Attention of a vision tower through torch's own kernel, which holds no [heads, N, N] buffer."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TAKES = (_FLOATS, _FLOATS, _FLOATS)  # q, k, v


def run(q: Tensor, k: Tensor, v: Tensor, cu_lengths: Sequence[int], scale: float) -> Tensor:
    """Segments of equal length share one call: a 2.5-VL picture has hundreds of windows of at most four sizes."""
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
