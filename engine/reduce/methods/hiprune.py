"""HiPrune: keep what a middle layer looks at with its surroundings, and what a deep layer looks at.

Source: Liu et al., 2025, arXiv:2508.00553 (released code: Danielement321/HiPrune).
Anchors are the tokens most attended to at a middle layer, buffers their neighbours on the grid, registers the best of
the rest at the last layer. Attention received counts every query, CLS's too, so encoders without CLS are no exception.
Departs from it: a neighbour is above, below, left or right on the grid, where the released index +- 1 goes on in the
next row (`compat` restores it); and where anchors and buffers exceed the budget, buffers go first, the least attended
first. The middle layer is a share of the depth: the paper's layer 9 of LLaVA-1.5's tower; it uses the 16th of 32 in
Qwen2.5-VL's (`object_layer=0.48`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.primitives.greedy import Quota, neighbours, quota_union
from foveate.engine.primitives.ranking import finite
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import signals
from foveate.engine.vision.inputs import VisualInputs
from foveate.engine.vision.signals import Signal, Tower


@dataclass(frozen=True, kw_only=True)
class HiPrune(Reducer):
    """Reads attention received at two layers; the features do not matter."""

    source: ClassVar[str] = "arXiv:2508.00553"
    group: ClassVar[Group] = "by attention"

    alpha: float = 0.1  # share of the budget for anchors and their buffers, five tokens each
    object_layer: float = 0.36  # where anchors are looked for, as a share of the depth
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
        """The rows next to given ones; of cells that an earlier stage dropped there are none."""
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
