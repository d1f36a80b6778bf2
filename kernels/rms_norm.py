"""RMSNorm over the last axis."""

from torch import Tensor
from torch.nn import functional

from foveate.kernels.hardware.dispatch import choose


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight.

    Args:
        x: [n, d].
        weight: [d].
    """
    return choose(reference, x.device, x.dtype, weight.dtype)(x, weight, eps)


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition."""
    return functional.rms_norm(x, (x.shape[1],), weight, eps)
