"""Linear layers over packed weights, with what follows them: bias, activation or gate, and residual."""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from foveate.kernels.native import kernels
from foveate.kernels.weights import FORMS, PackedWeight, unpack

Activation = Literal["none", "silu", "quick_gelu", "gelu_tanh", "gelu", "silu_gate"]
_ACTIVATIONS: dict[str, int] = {name: index for index, name in enumerate(get_args(Activation))}  # the C++ enums
_FORMS: dict[str, int] = {name: index for index, name in enumerate(FORMS)}


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
        weight: [n, k]. Gated with the activation `silu_gate`, which is silu(first half) * second half, and only with it.
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
    native = kernels()
    if native is None or weight.scales is not None:
        return reference(x, weight, bias, activation=activation, residual=residual)
    x = _rows(x)
    if bias is not None:
        bias = bias.contiguous()
    out = torch.empty(m, width)
    if residual is not None:
        residual = _rows(residual)
    native.linear(
        x.data_ptr(),
        x.stride(0),
        m,
        weight.n,
        weight.k,
        weight.data.data_ptr(),
        0 if weight.scales is None else weight.scales.data_ptr(),
        _FORMS[weight.form],
        weight.round_inputs,
        0 if bias is None else bias.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else residual.stride(0),
        _ACTIVATIONS[activation],
        out.data_ptr(),
    )
    return out


def reference(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    activation: Activation = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """The definition of `linear`, over the unpacked weight."""
    out = functional.linear(x, unpack(weight), bias)
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


def _rows(x: Tensor) -> Tensor:
    """The same, with the values of a row side by side."""
    return x if x.stride(1) == 1 else x.contiguous()
