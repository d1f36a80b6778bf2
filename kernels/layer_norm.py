"""LayerNorm over the last axis."""

from torch import Tensor
from torch.nn import functional

from foveate.kernels.hardware.dispatch import choose


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean(x)) / std(x) * weight + bias.

    Args:
        x: [n, d].
        weight, bias: [d].
    """
    return choose(reference, x.device, x.dtype, weight.dtype)(x, weight, bias, eps)


def reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The definition."""
    return functional.layer_norm(x, (x.shape[1],), weight, bias, eps)
