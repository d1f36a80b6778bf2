"""Weights of linear layers, packed once for the CPU kernels: panels of 16 rows, in one of five forms.

One layout per form serves every instruction set. `data` is panel after panel, a panel being 16 rows of the matrix
(16 output columns), with n padded to whole panels and k to whole steps by zeros:

    float32   [n/16][k][16]
    bfloat16  [n/16][k/2][16][2]   pairs along k, as VNNI and AMX read them
    int16     [n/16][k/2][16][2]   symmetric, within -8191 and 8191, one scale per row and 128 k
    int8      [n/16][k/4][16][4]   symmetric, one scale per row and 128 k
    int4      [n/16][k/8][16][4]   stored + 8; low nibbles are the first 4 of 8 k, high nibbles the others; 64 k a scale

All are words of 32 bits, 16 to a step of k, so packing is one transposition of words.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.kernels import memory
from foveate.kernels.native import kernels

Form = Literal["float32", "bfloat16", "int8", "int4", "int16"]  # as linear.h counts them
FORMS: tuple[Form, ...] = get_args(Form)
INTEGERS = ("int16", "int8", "int4")  # forms with scales
PANEL = 16  # rows of a panel
# k is padded to whole groups; of integers, values with one scale
GROUP = {"float32": 1, "bfloat16": 2, "int8": 128, "int4": 64, "int16": 128}
_PER_WORD = {"float32": 1, "bfloat16": 2, "int8": 4, "int4": 8, "int16": 2}
_MOST = {"int8": 127, "int16": 8191}  # of a symmetric value
_SOURCES = (torch.float32, torch.bfloat16, torch.float16)  # what the compiled version packs, as pack.h counts them
_SLAB = 64 * PANEL  # rows that the plain version packs at a time, and `unpack` unpacks


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A matrix [n, k] in the layout of its form.

    gated: two projections of n/2 rows, all of the first before all of the second; their panels alternate, so that the
        kernel finishes silu(first) * second while both are in registers.
    round_inputs: bfloat16 only: inputs may be rounded to bfloat16 where the hardware multiplies it natively. False:
        products are exact in float32 at every level.
    """

    form: Form
    n: int
    k: int
    data: Tensor  # int32 [panels, k steps, 16]
    scales: Tensor | None  # float32 [panels, groups, 16]
    gated: bool
    round_inputs: bool

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)


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
    data = memory.weights.empty((sum(counts), groups * GROUP[form] // _PER_WORD[form], PANEL), torch.int32)
    scales = memory.weights.empty((sum(counts), groups, PANEL), torch.float32) if form in INTEGERS else None
    for i, piece in enumerate(pieces):
        where = slice(i, None, 2) if gated else slice(sum(counts[:i]), sum(counts[: i + 1]))
        _fill(piece, form, data[where], None if scales is None else scales[where])
    assert data.data_ptr() % 64 == 0, "a step of a panel is one cache line"
    return PackedWeight(form, n, k, data, scales, gated, round_inputs)


def _fill(matrix: Tensor, form: Form, data: Tensor, scales: Tensor | None) -> None:
    """Write the panels of a matrix; those of `data` and `scales` may lie apart."""
    native = kernels()
    if native is None or matrix.device.type != "cpu" or matrix.dtype not in _SOURCES:
        return reference(matrix, form, data, scales)
    (n, k), matrix = matrix.shape, matrix if matrix.stride(1) == 1 else matrix.contiguous()
    step = data.stride(0) // (data.shape[1] * PANEL)
    native.pack(
        *(matrix.data_ptr(), _SOURCES.index(matrix.dtype), matrix.stride(0), n, k, FORMS.index(form)),
        *(data.data_ptr(), 0 if scales is None else scales.data_ptr(), step),
    )


def reference(matrix: Tensor, form: Form, data: Tensor, scales: Tensor | None) -> None:
    """The definition of the layout and of its quantization: write the panels of one projection."""
    for panel, slab in _slabs(matrix, data.shape[1] * _PER_WORD[form]):
        end = panel + slab.shape[0] // PANEL
        words, slab_scales = _words(slab, form)
        data[panel:end] = _transposed(words)
        if scales is not None and slab_scales is not None:
            scales[panel:end] = _transposed(slab_scales)


def unpack(packed: PackedWeight) -> Tensor:
    """Float32 [n, k]: exactly the matrix the kernels multiply by."""
    out = torch.empty(packed.n, packed.k)
    for start in range(0, packed.n, _SLAB):
        end = min(start + _SLAB, packed.n)
        out[start:end] = rows(packed, torch.arange(start, end))
    return out


def rows(packed: PackedWeight, ids: Tensor) -> Tensor:
    """Rows `ids` (int64 [m]) of `unpack(packed)`, float32 [m, k]: an embedding tied to the output head."""
    if packed.gated:
        half = packed.n // 2
        panel, lane = ids % half // PANEL * 2 + ids // half, ids % half % PANEL
    else:
        panel, lane = ids // PANEL, ids % PANEL
    words = packed.data[panel, :, lane].contiguous()
    if packed.form == "float32":
        return words.view(torch.float32)[:, : packed.k]
    if packed.form == "bfloat16":
        return words.view(torch.bfloat16)[:, : packed.k].float()
    assert packed.scales is not None, "an integer form has scales"
    values = words.view(torch.int16 if packed.form == "int16" else torch.int8)
    if packed.form == "int4":
        nibbles = words.view(torch.uint8).view(*words.shape, 4)
        values = torch.stack([nibbles & 15, nibbles >> 4], 2).flatten(1).to(torch.int8) - 8
    grouped = values.view(len(values), packed.scales.shape[1], GROUP[packed.form]).float()
    return torch.flatten(grouped * packed.scales[panel, :, lane].unsqueeze(2), 1)[:, : packed.k]


def _slabs(weight: Tensor, k: int) -> Iterator[tuple[int, Tensor]]:
    """Parts of whole panels, padded with zeros to k columns: (first panel, rows)."""
    for start in range(0, weight.shape[0], _SLAB):
        slab = weight[start : start + _SLAB]
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
