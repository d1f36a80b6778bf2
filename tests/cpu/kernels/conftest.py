"""What the tests of products share: inputs as the integer kernels read them."""

import pytest
import torch
from torch import Tensor

from foveate.kernels.cpu.weights import GROUP, INTEGERS, Form


class Quantized:
    """The inputs' side of the integer forms, in plain torch."""

    def __call__(self, x: Tensor, form: Form) -> Tensor:
        """x as the kernels multiply it: rows in groups of k, to the nearest, ties to even. Other forms: x itself."""
        if form not in INTEGERS:
            return x
        grouped = self.grouped(x, form)
        step = self.step(grouped, form)
        top = grouped.abs().amax(-1, keepdim=True)
        over, one = (1, step) if form == "int16" else (127, top)
        inverse = torch.where(one > 0, torch.full_like(one, over) / one, 0)
        return (torch.round(grouped.double() * inverse.double()).float() * step).flatten(1)[:, : x.shape[1]]

    def grouped(self, x: Tensor, form: Form) -> Tensor:
        """[m, groups, values with one scale], with zeros after the row."""
        return torch.nn.functional.pad(x, (0, -x.shape[1] % GROUP[form])).unflatten(1, (-1, GROUP[form]))

    def step(self, grouped: Tensor, form: Form) -> Tensor:
        """Of each group: 8 bits; or as fine as the sum of its products with weights up to 8191 fits in 31 bits, and at
        most 15 bits."""
        size = grouped.abs()
        top = size.amax(-1, keepdim=True)
        if form != "int16":
            return top / 127
        return torch.maximum(top / 32767, size.sum(-1, keepdim=True) / 262000)


@pytest.fixture
def quantized() -> Quantized:
    return Quantized()
