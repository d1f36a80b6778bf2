"""Attention that each row of a picture receives: the column means of [N, N], of which few rows exist at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.kernels.attention_rows import attention_rows
from foveate.kernels.hardware.dispatch import choose

_QUERY_BLOCK = 64  # rows of scores alive at once


def received(q: Tensor, k: Tensor, cu_lengths: Sequence[int], scale: float) -> Tensor:
    """Attention each row receives: the mean over all queries of its segment and over heads.

    Args:
        q, k: [n, heads, d] packed.
        cu_lengths: [n_segments + 1].

    Returns:
        float32 [n]; each segment sums to 1.
    """
    return choose(reference, q.device, q.dtype, k.dtype)(q, k, cu_lengths, scale)


def reference(q: Tensor, k: Tensor, cu_lengths: Sequence[int], scale: float) -> Tensor:
    """The definition."""
    out = torch.zeros(q.shape[0], dtype=torch.float32, device=q.device)
    for start, end in zip(cu_lengths[:-1], cu_lengths[1:], strict=True):
        for first in range(start, end, _QUERY_BLOCK):
            rows = q[first : min(first + _QUERY_BLOCK, end)]
            out[start:end] += attention_rows(rows, k[start:end], scale).sum(0)
        out[start:end] /= end - start
    return out
