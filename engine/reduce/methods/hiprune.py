"""HiPrune: keep the tokens that a middle layer attends to, their neighbours, and those that a deep layer attends to.

Source: Liu et al., 2025, arXiv:2508.00553 (released code: Danielement321/HiPrune).
Anchors are the tokens most attended to at a middle layer. Buffers are the neighbours of anchors on the grid. Registers
are the best of the other tokens at the last layer. Attention received counts every query, CLS's too, so encoders
without a CLS row are no exception.
Departs from the paper: a neighbour is above, below, left or right on the grid. The released code takes index +- 1,
which continues in the next row (`compat` restores that). If anchors and buffers exceed the budget, the least attended
buffers are dropped first. The middle layer is a share of the depth: the paper's layer 9 of LLaVA-1.5's tower. In
Qwen2.5-VL's tower the paper uses the 16th of 32 layers (`object_layer=0.48`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import Signal, Tower, signals
from foveate.engine.primitives.greedy import Quota, neighbours, quota_union
from foveate.engine.primitives.ranking import finite
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import VisualInputs


@dataclass(frozen=True, kw_only=True)
class HiPrune(Reducer):
    """Reads attention received at two layers and no features."""

    source: ClassVar[str] = "arXiv:2508.00553"
    group: ClassVar[Group] = "by attention"

    alpha: float = 0.1  # share of the budget for anchors with their buffers, five tokens for each anchor
    object_layer: float = 0.36  # the middle layer, which ranks the anchors, as a share of the depth
    compat: bool = False  # neighbours wrap around at the row's end, as released

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ConfigError(f"alpha: {self.alpha} is not in [0, 1]")
        if not 0.0 <= self.object_layer <= 1.0:
            raise ConfigError(f"object_layer: {self.object_layer} is not in [0, 1]")

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({signals.recv(self.object_layer), signals.recv(-1)})

    def select(self, inputs: VisualInputs, k: int) -> Tensor:
        middle, deep = (finite("attention weights", inputs.recv(layer)) for layer in (self.object_layer, -1))
        anchors = Quota(middle, round(k * self.alpha / 5), self._around(inputs))
        return quota_union([anchors, Quota(deep, k)], k)

    def _around(self, inputs: VisualInputs) -> Callable[[Tensor], Tensor]:
        """A function from rows to the rows beside them. Cells that an earlier method dropped have no row."""
        grid, n = inputs.grid, inputs.grid.n_tokens
        places = torch.arange(n) if inputs.places is None else inputs.places.cpu()
        row_of = torch.full((n,), -1).index_copy_(0, places, torch.arange(len(places)))

        def around(rows: Tensor) -> Tensor:
            cells = places[rows.cpu()]
            if self.compat:
                steps = torch.tensor([-1, 1, -grid.cols, grid.cols])
                found = (cells[:, None] + steps).clamp(0, n - 1).flatten()
            else:
                found = neighbours(grid, cells)
            next_to = row_of[found]
            return next_to[next_to >= 0].to(rows.device)

        return around


METHOD = HiPrune
