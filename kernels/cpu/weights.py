"""Weights of linear layers as the CPU reads them: panels of 16 rows, in one of five forms.

One layout per form serves every instruction set. `data` is panel after panel, a panel being 16 rows of the matrix
(16 output columns), with n padded to whole panels and k to whole steps by zeros:

    float32   [n/16][k][16]
    bfloat16  [n/16][k/2][16][2]   pairs along k, as VNNI and AMX read them
    int16     [n/16][k/2][16][2]   symmetric, within -8191 and 8191, one scale per row and 128 k
    int8      [n/16][k/4][16][4]   symmetric, one scale per row and 128 k
    int4      [n/16][k/8][16][4]   stored + 8; low nibbles are the first 4 of 8 k, high nibbles the others; 64 k a scale

All are words of 32 bits, 16 to a step of k, so packing is one transposition of words.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Form = Literal["float32", "bfloat16", "int8", "int4", "int16"]  # as linear.h counts them
FORMS: tuple[Form, ...] = get_args(Form)
INTEGERS = ("int16", "int8", "int4")  # forms with scales
PANEL = 16  # rows of a panel
# k is padded to whole groups; of integers, values with one scale
GROUP = {"float32": 1, "bfloat16": 2, "int8": 128, "int4": 64, "int16": 128}
PER_WORD = {"float32": 1, "bfloat16": 2, "int8": 4, "int4": 8, "int16": 2}  # values in a word of 32 bits
SLAB = 64 * PANEL  # rows that the reference of `pack` packs at a time, and `unpack` unpacks


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


def unpack(packed: PackedWeight) -> Tensor:
    """Float32 [n, k]: exactly the matrix the kernels multiply by."""
    out = torch.empty(packed.n, packed.k)
    for start in range(0, packed.n, SLAB):
        end = min(start + SLAB, packed.n)
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
