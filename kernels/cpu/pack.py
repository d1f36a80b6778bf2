"""Packing in C++: 16 rows at a time are quantized and transposed while they are in cache."""

import torch
from torch import Tensor

from foveate.kernels.cpu.levels import extension
from foveate.kernels.cpu.weights import FORMS, PANEL, Form

_SOURCES = (torch.float32, torch.bfloat16, torch.float16)  # as pack.h counts them
TAKES = (_SOURCES,)  # the matrix


def run(matrix: Tensor, form: Form, data: Tensor, scales: Tensor | None) -> None:
    """As the reference, to the bit; the panels of `data` and `scales` may lie apart."""
    (n, k), matrix = matrix.shape, matrix if matrix.stride(1) == 1 else matrix.contiguous()
    step = data.stride(0) // (data.shape[1] * PANEL)
    extension().pack(
        *(matrix.data_ptr(), _SOURCES.index(matrix.dtype), matrix.stride(0), n, k, FORMS.index(form)),
        *(data.data_ptr(), 0 if scales is None else scales.data_ptr(), step),
    )
