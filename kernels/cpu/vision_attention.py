"""Attention of a vision tower in C++: all segments in one call, keys in tiles."""

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.kernels.cpu.layout import packed_heads
from foveate.kernels.cpu.levels import extension

TAKES = ((torch.float32,), (torch.float32,), (torch.float32,))  # q, k, v


def run(q: Tensor, k: Tensor, v: Tensor, cu_lengths: Sequence[int], scale: float) -> Tensor:
    """As the reference."""
    q, k, v = (packed_heads(x) for x in (q, k, v))
    assert q.shape == k.shape == v.shape, "every row has a query, a key and a value"
    cu = torch.tensor(cu_lengths, dtype=torch.int32)
    out = torch.empty(q.shape)
    extension().vision_attention(
        *(q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0)),
        *(cu.data_ptr(), out.data_ptr(), 0, len(cu) - 1, *q.shape[1:], scale),
    )
    return out
