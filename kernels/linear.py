"""Linear layers over packed weights, with what follows them: bias, activation or gate, and residual."""

import logging
from functools import cache
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from foveate.kernels.native import LEVELS, kernels, level
from foveate.kernels.weights import FORMS, PackedWeight, pack, unpack

Activation = Literal["none", "silu", "quick_gelu", "gelu_tanh", "gelu", "silu_gate"]
_ACTIVATIONS: dict[str, int] = {name: index for index, name in enumerate(get_args(Activation))}  # the C++ enums
_FORMS: dict[str, int] = {name: index for index, name in enumerate(FORMS)}
_log = logging.getLogger(__name__)


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
    native = compiled()
    if native is None:
        return reference(x, weight, bias, activation=activation, residual=residual)
    return _run(native, x, weight, bias, activation, residual)


def compiled() -> ModuleType | None:
    """The compiled kernels, once their products have been compared; None: run the reference."""
    native = kernels()
    if native is not None:
        _verify(level())
    return native


def _run(
    native: ModuleType, x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: str, residual: Tensor | None
) -> Tensor:
    x = _rows(x)
    if bias is not None:
        bias = bias.contiguous()
    if residual is not None:
        residual = _rows(residual)
    out = torch.empty(x.shape[0], weight.n // 2 if weight.gated else weight.n)
    native.linear(
        x.data_ptr(),
        x.stride(0),
        x.shape[0],
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


@cache
def _verify(name: str) -> None:
    """Compare each level up to this one with AVX2, once; one that disagrees is left out from then on.

    A wrong product is worse than a slow one, and no test has run where every virtual machine's instructions run.
    """
    native, last = kernels(), LEVELS.index(name)
    if native is None or last <= 1:
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 1124, generator=generator).bfloat16().float()  # exact where inputs are rounded
    matrix = torch.randn(72, 1124, generator=generator)
    problems = [
        (x[:m, :k], pack(matrix[:, :k], form, round_inputs=form == "bfloat16"))
        for form in FORMS
        for m, k in ((37, 1124), (5, 1088))
    ]
    try:
        native.set_level(1)
        expected = [_run(native, inputs, packed, None, "none", None) for inputs, packed in problems]
        for index in range(2, last + 1):
            native.set_level(index)
            got = [_run(native, inputs, packed, None, "none", None) for inputs, packed in problems]
            errors = [float((a - b).abs().max()) for a, b in zip(got, expected, strict=True)]
            if not max(errors) < 1e-2:  # of sums about 33 in size: float32 in another order differs by 1e-4
                native.distrust_linear(index)
                _log.warning("linear layers do not use %s: it differs from AVX2 by %s", LEVELS[index], max(errors))
    finally:
        native.set_level(last)


def _rows(x: Tensor) -> Tensor:
    """The same, with the values of a row side by side."""
    return x if x.stride(1) == 1 else x.contiguous()
