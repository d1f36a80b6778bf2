"""Bidirectional attention of a vision tower over packed pictures.

The versions hold no [heads, N, N] buffer: the CPU's goes through tiles in C++, CUDA's through torch's own kernel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.kernels.hardware.dispatch import choose


def vision_attention(q: Tensor, k: Tensor, v: Tensor, cu_lengths: Sequence[int], scale: float) -> Tensor:
    """Attend within each segment, every row to every row.

    Args:
        q, k, v: [n, heads, d]; views into fused rows are read as they are.
        cu_lengths: [n_segments + 1] ascending from 0 to n; a segment is a picture, or a window of one.

    Returns:
        [n, heads, d].
    """
    assert cu_lengths[0] == 0 and cu_lengths[-1] == q.shape[0], "segments cover all rows"
    return choose(reference, q.device, q.dtype, k.dtype, v.dtype)(q, k, v, cu_lengths, scale)


def reference(q: Tensor, k: Tensor, v: Tensor, cu_lengths: Sequence[int], scale: float) -> Tensor:
    """The definition: softmax in float32, one segment after the other."""
    out = torch.empty_like(q)
    for start, end in zip(cu_lengths[:-1], cu_lengths[1:], strict=True):
        scores = torch.einsum("mhd,lhd->hml", q[start:end].float(), k[start:end].float()) * scale
        out[start:end] = torch.einsum("hml,lhd->mhd", scores.softmax(-1), v[start:end].float()).to(q.dtype)
    return out
