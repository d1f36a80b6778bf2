"""Packing of a matrix for the CPU, once, at load: into the forms of `kernels/cpu/weights.py`."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.kernels.cpu import memory
from foveate.kernels.cpu.weights import FORMS, GROUP, INTEGERS, PANEL, PER_WORD, SLAB, Form, PackedWeight
from foveate.kernels.hardware.dispatch import choose

_MOST = {"int8": 127, "int16": 8191}  # of a symmetric value


def pack(
    weight: Tensor | Sequence[Tensor], form: Form, *, gated: bool = False, round_inputs: bool = False
) -> PackedWeight:
    """Pack a matrix [n, k] of float32, bfloat16 or float16; the integers are quantized group-wise along k.

    Args:
        weight: the matrix, or pieces of it, one above the other, which are then not put together first.

    Raises:
        ValueError: the form is unknown, or a gated matrix has an odd number of rows.
    """
    if form not in FORMS:
        raise ValueError(f"weight form {form!r}: there are {', '.join(FORMS)}")
    assert not round_inputs or form == "bfloat16", "only bfloat16 weights have inputs to round"
    pieces = [weight] if isinstance(weight, Tensor) else list(weight)
    n, k = sum(len(piece) for piece in pieces), pieces[0].shape[1]
    if gated and n % 2:
        raise ValueError(f"a gated weight is two projections of equal size, but this one has {n} rows; pass both")
    if gated and [len(piece) for piece in pieces] != [n // 2, n // 2]:
        pieces = list(torch.cat(pieces).chunk(2))
    elif not gated and any(len(piece) % PANEL for piece in pieces[:-1]):
        pieces = [torch.cat(pieces)]
    counts = [-(-len(piece) // PANEL) for piece in pieces]  # panels
    groups = -(-k // GROUP[form])
    data = memory.weights.empty((sum(counts), groups * GROUP[form] // PER_WORD[form], PANEL), torch.int32)
    scales = memory.weights.empty((sum(counts), groups, PANEL), torch.float32) if form in INTEGERS else None
    for i, piece in enumerate(pieces):
        where = slice(i, None, 2) if gated else slice(sum(counts[:i]), sum(counts[: i + 1]))
        fill = choose(reference, piece.device, piece.dtype)
        fill(piece, form, data[where], None if scales is None else scales[where])
    assert data.data_ptr() % 64 == 0, "a step of a panel is one cache line"
    return PackedWeight(form, n, k, data, scales, gated, round_inputs)


def reference(matrix: Tensor, form: Form, data: Tensor, scales: Tensor | None) -> None:
    """The definition of the layout and of its quantization: write the panels of one projection."""
    for panel, slab in _slabs(matrix, data.shape[1] * PER_WORD[form]):
        end = panel + slab.shape[0] // PANEL
        words, slab_scales = _words(slab, form)
        data[panel:end] = _transposed(words)
        if scales is not None and slab_scales is not None:
            scales[panel:end] = _transposed(slab_scales)


def _slabs(weight: Tensor, k: int) -> Iterator[tuple[int, Tensor]]:
    """Parts of whole panels, padded with zeros to k columns: (first panel, rows)."""
    for start in range(0, weight.shape[0], SLAB):
        slab = weight[start : start + SLAB]
        yield start // PANEL, pad(slab, (0, k - slab.shape[1], 0, -slab.shape[0] % PANEL))


def _words(slab: Tensor, form: Form) -> tuple[Tensor, Tensor | None]:
    """Rows as int32 words along k, and their scales [rows, groups]."""
    if form == "float32":
        return slab.float().contiguous().view(torch.int32), None
    if form == "bfloat16":
        return slab.bfloat16().contiguous().view(torch.int32), None
    grouped = slab.float().reshape(len(slab), -1, GROUP[form])
    if form != "int4":
        most = _MOST[form]
        scales = grouped.abs().amax(2) / most
        values = _divided(grouped, scales).round_().clamp_(-most, most)
        return values.to(torch.int8 if form == "int8" else torch.int16).flatten(1).view(torch.int32), scales
    # The value farthest from zero becomes -8 exactly, whatever its sign: one step finer than a symmetric 7.
    low, high = grouped.aminmax(dim=2)
    scales = torch.where(high > -low, high, low) / -8
    values = (_divided(grouped, scales).round_().clamp_(-8, 7) + 8).to(torch.uint8)
    pairs = values.view(len(slab), -1, 2, 4)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1).view(torch.int32), scales


def _divided(grouped: Tensor, scales: Tensor) -> Tensor:
    return torch.div(grouped, torch.where(scales == 0, 1.0, scales).unsqueeze(2))


def _transposed(words: Tensor) -> Tensor:
    """[rows, c] -> [rows / 16, c, 16]."""
    return words.view(-1, PANEL, words.shape[1]).transpose(1, 2)
