"""RMSNorm in one pass over each row, which stays in cache."""

import torch
from torch import Tensor

from foveate.kernels.cpu.levels import extension
from foveate.kernels.rms_norm import reference

TAKES = ((torch.float32,), (torch.float32,))  # x, weight


def run(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the reference, which runs where the values of a row lie apart."""
    if x.stride(1) != 1:
        return reference(x, weight, eps)
    out = torch.empty(x.shape)
    extension().rms_norm(x.data_ptr(), x.stride(0), weight.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], eps)
    return out
