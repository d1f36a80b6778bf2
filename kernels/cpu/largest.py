"""The largest score of each row, in one pass."""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.kernels.cpu.layout import address, addresses
from foveate.kernels.cpu.levels import extension

TAKES = ((torch.float32,),)  # the rows


def run(rows: Sequence[Tensor]) -> tuple[list[int], list[bool]]:
    """As the reference."""
    places, ids, finite = addresses(rows), array("q", bytes(8 * len(rows))), array("b", bytes(len(rows)))
    extension().largest(address(places), len(rows), rows[0].shape[0], address(ids), address(finite))
    return ids.tolist(), [bool(x) for x in finite]
