"""Linear layers in C++ over packed weights, with what follows a product while its values are in registers."""

import logging
from functools import cache
from types import ModuleType
from typing import get_args

import torch
from torch import Tensor

from foveate.kernels.cpu.layout import packed_rows
from foveate.kernels.cpu.levels import LEVELS, extension, level
from foveate.kernels.cpu.weights import FORMS, PackedWeight
from foveate.kernels.linear import Activation
from foveate.kernels.pack import pack

TAKES = ((torch.float32,),)  # x

_ACTIVATIONS: dict[str, int] = {name: index for index, name in enumerate(get_args(Activation))}  # the C++ enums
_FORMS: dict[str, int] = {name: index for index, name in enumerate(FORMS)}
log = logging.getLogger("foveate.kernels.linear")


def run(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    activation: Activation = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """As the reference; inputs are quantized or rounded as the form of the weight says."""
    return _multiply(verified(), x, weight, bias, activation, residual)


def verified() -> ModuleType:
    """The extension module, once its products have been compared."""
    _verify(level())
    return extension()


def _multiply(
    module: ModuleType,
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    activation: Activation = "none",
    residual: Tensor | None = None,
) -> Tensor:
    x = packed_rows(x)
    if bias is not None:
        bias = bias.contiguous()
    if residual is not None:
        residual = packed_rows(residual)
    out = torch.empty(x.shape[0], weight.n // 2 if weight.gated else weight.n)
    module.linear(
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


@cache
def _verify(name: str) -> None:
    """Compare each level up to this one with AVX2, once; one that disagrees is left out from then on.

    A wrong product is worse than a slow one, and no test has run where every virtual machine's instructions run.
    """
    module, last = extension(), LEVELS.index(name)
    if last <= 1:
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
        module.set_level(1)
        expected = [_multiply(module, inputs, packed) for inputs, packed in problems]
        for index in range(2, last + 1):
            module.set_level(index)
            got = [_multiply(module, inputs, packed) for inputs, packed in problems]
            errors = [float((a - b).abs().max()) for a, b in zip(got, expected, strict=True)]
            if not max(errors) < 1e-2:  # of sums about 33 in size: float32 in another order differs by 1e-4
                module.distrust_linear(index)
                log.warning("linear layers do not use %s: it differs from AVX2 by %s", LEVELS[index], max(errors))
    finally:
        module.set_level(last)
