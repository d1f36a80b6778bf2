"""Linear layers over packed weights, with what follows them: bias, activation or gate, and residual."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from foveate.kernels.cpu.weights import PackedWeight, unpack
from foveate.kernels.hardware.dispatch import choose

Activation = Literal["none", "silu", "quick_gelu", "gelu_tanh", "gelu", "silu_gate"]


def linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    activation: Activation = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """activation(x @ W.T + bias) + residual.

    On one machine a row's result does not depend on the other rows of the call, to the bit.

    Args:
        x: float32 [m, k]; rows may be strided.
        weight: [n, k]. Gated with the activation `silu_gate`, silu(first half) * second half, and only with it.
        bias: float32 [n].
        residual: float32 [m, n], or [m, n / 2] behind a gate; rows may be strided.

    Returns:
        float32 [m, n], or [m, n / 2] behind a gate.
    """
    gate = activation == "silu_gate"
    m, width = x.shape[0], weight.n // 2 if gate else weight.n
    assert weight.gated == gate, "a gated weight goes with silu_gate, and only with it"
    assert x.dtype == torch.float32 and x.shape == (m, weight.k), "x is float32 [m, k]"
    assert bias is None or bias.shape == (weight.n,), "one bias for each row of the weight"
    assert residual is None or residual.shape == (m, width), "the residual has the shape of the result"
    version = choose(reference, x.device, x.dtype)
    return version(x, weight, bias, activation=activation, residual=residual)


def reference(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    activation: Activation = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """The definition of `linear`, over the unpacked weight."""
    return epilogue(functional.linear(x, unpack(weight), bias), activation, residual)


def epilogue(out: Tensor, activation: Activation, residual: Tensor | None) -> Tensor:
    """What follows a product [m, n], in plain torch; behind a gate the result is [m, n / 2]."""
    if activation == "silu":
        out = functional.silu(out)
    elif activation == "quick_gelu":
        out = out * torch.sigmoid(1.702 * out)
    elif activation == "gelu_tanh":
        out = functional.gelu(out, approximate="tanh")
    elif activation == "gelu":
        out = functional.gelu(out)
    elif activation == "silu_gate":
        first, second = out.chunk(2, dim=1)
        out = functional.silu(first) * second
    return out if residual is None else out + residual
