"""Small pieces: norms, tables, rotary frequencies."""

import torch
from torch import Tensor, nn

from foveate.kernels.layer_norm import layer_norm
from foveate.kernels.rms_norm import rms_norm


class Conv2d(nn.Conv2d):
    """Without its random start: every weight comes from a checkpoint."""

    def reset_parameters(self) -> None: ...


class Table(nn.Module):
    """Rows that are added as they are, such as learned positions."""

    def __init__(self, n: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, size))


class LayerNorm(nn.Module):
    """Scale rows to mean 0 and variance 1, then by a weight and a bias."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(size)), nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Scale rows to a mean square of one. Statistics in float32 whatever the dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def frequencies(theta: float, dim: int, device: torch.device) -> Tensor:
    """[dim / 2] float32 rotary frequencies theta^(-2i/dim)."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))
