"""RMSNorm and LayerNorm over the last axis. On the CPU in float32 one pass over rows in cache; else torch's own."""

import torch
from torch import Tensor
from torch.nn import functional

from foveate.kernels.native import kernels


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight.

    Args:
        x: [n, d].
        weight: [d].
    """
    fast = kernels() if x.device.type == "cpu" and x.dtype == torch.float32 == weight.dtype else None
    if fast is None or x.stride(1) != 1:
        return functional.rms_norm(x, (x.shape[1],), weight, eps)
    out = torch.empty(x.shape)
    fast.rms_norm(x.data_ptr(), x.stride(0), weight.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], eps)
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean(x)) / std(x) * weight + bias.

    Args:
        x: [n, d].
        weight, bias: [d].
    """
    fast = kernels() if x.device.type == "cpu" and x.dtype == torch.float32 == weight.dtype else None
    if fast is None or x.stride(1) != 1:
        return functional.layer_norm(x, (x.shape[1],), weight, bias, eps)
    out = torch.empty(x.shape)
    w, b = weight.data_ptr(), bias.data_ptr()
    fast.layer_norm(x.data_ptr(), x.stride(0), w, b, out.data_ptr(), x.shape[0], x.shape[1], eps)
    return out
