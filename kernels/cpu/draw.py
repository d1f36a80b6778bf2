"""Draws in C++: passes over a row find the few candidates, and only the candidates are computed in float64."""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.kernels.cpu.layout import address, addresses
from foveate.kernels.cpu.levels import extension
from foveate.kernels.draw import Law

TAKES = ((torch.float32,),)  # the rows


def run(rows: Sequence[Tensor], laws: Sequence[Law]) -> list[int]:
    """As the reference, from the same noise.

    Where the last token of a nucleus depends on how the total mass is rounded (a relative 1e-7 of what lies outside of
    the nucleus) the two may differ.
    """
    places, ids = addresses(rows), array("q", bytes(8 * len(rows)))
    numbers = array("d", [x for law in laws for x in law[:4]])
    keys = array("q", [word for law in laws for word in law.key])
    extension().draw(address(places), len(rows), rows[0].shape[0], address(numbers), address(keys), address(ids))
    return ids.tolist()
