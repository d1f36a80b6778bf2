"""FoPru: keep the tokens, or the rows of the picture, that the encoder attends to most.

Source: Jiang et al., 2024, arXiv:2411.14164.
The significance of a token is the attention it receives from all queries at the layer whose output the projector reads.
`rank` keeps the most significant tokens, wherever they are. `row` keeps whole rows of the picture, ranked by their sum,
so that a line of text stays in one piece.
Departs from the paper: the method meets the budget exactly. Of the last row, it keeps the most significant tokens; the
paper rounds to whole rows. A tiled picture is reduced tile by tile, and each tile has a share of the budget.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from foveate.engine.common import Signal, Tower, signals
from foveate.engine.primitives.ranking import finite, top
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import VisualInputs


@dataclass(frozen=True, kw_only=True)
class FoPru(Reducer):
    """Reads attention alone. Kept sets are nested: a smaller budget keeps a subset."""

    source: ClassVar[str] = "arXiv:2411.14164"
    group: ClassVar[Group] = "by attention"

    order: Literal["rank", "row"] = "rank"  # rank: single tokens; row: whole rows of the picture
    attention: Literal["received", "cls"] = "received"  # cls: the CLS row's alone, if there is one

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({signals.recv() if self.attention == "received" else signals.cls_row()})

    def select(self, inputs: VisualInputs, k: int) -> Tensor:
        attention = inputs.recv() if self.attention == "received" else inputs.cls_row()
        significance = finite("attention weights", attention).cpu()
        if self.order == "rank":
            return top(significance, k)
        row = inputs.cell_yx[0]
        mass = torch.bincount(row, weights=significance.double())
        best_row = torch.sort(mass, descending=True, stable=True).indices
        rank = torch.empty_like(best_row).index_copy_(0, best_row, torch.arange(len(best_row)))
        best = torch.sort(significance, descending=True, stable=True).indices
        return best[torch.sort(rank[row[best]], stable=True).indices[:k]].sort().values


METHOD = FoPru
