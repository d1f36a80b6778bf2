"""Rotary position embedding: turn the pairs (i, i + d/2) of every head by the row's angles."""

import torch
from torch import Tensor

from foveate.kernels.hardware.dispatch import choose


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads; `x` may be overwritten, so read the result only.

    Args:
        x: [n, heads, d], heads side by side, rows at any stride.
        cos, sin: [n, d / 2] float32 of the angles.
    """
    return choose(reference, x.device, x.dtype, cos.dtype)(x, cos, sin)


def reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition, in float32; `x` stays as it is."""
    low, high = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)
