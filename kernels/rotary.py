"""Rotary position embedding: turn the pairs (i, i + d/2) of every head by the row's angles."""

import torch
from torch import Tensor

from foveate.kernels.native import kernels


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads; `x` may be overwritten, so read the result only.

    Args:
        x: [n, heads, d], heads side by side, rows at any stride.
        cos, sin: [n, d / 2] float32 of the angles.
    """
    fast = kernels() if x.device.type == "cpu" and x.dtype == torch.float32 == cos.dtype else None
    n, heads, d = x.shape
    if fast is None or x.stride(2) != 1 or x.stride(1) != d or not (cos.is_contiguous() and sin.is_contiguous()):
        return reference(x, cos, sin)
    fast.rotate(x.data_ptr(), x.stride(0), cos.data_ptr(), sin.data_ptr(), n, heads, d // 2)
    return x


def reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition, in float32; `x` stays as it is."""
    low, high = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)
