"""Rotary position embedding in place."""

import torch
from torch import Tensor

from foveate.kernels.cpu.levels import extension
from foveate.kernels.rotary import reference

TAKES = ((torch.float32,), (torch.float32,))  # x, cos


def run(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Overwrites `x`. The reference runs where heads lie apart, or angles."""
    n, heads, d = x.shape
    if x.stride(2) != 1 or x.stride(1) != d or not (cos.is_contiguous() and sin.is_contiguous()):
        return reference(x, cos, sin)
    extension().rotate(x.data_ptr(), x.stride(0), cos.data_ptr(), sin.data_ptr(), n, heads, d // 2)
    return x
