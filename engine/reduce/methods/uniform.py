"""Uniform: keep a regular grid of tokens, whatever the picture shows.

The method keeps the most even h x w <= k lattice (`ranking.lattice`), then exactly k - h*w more cells, each the
farthest from all cells kept so far. The choice depends on the grid and k alone.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.engine.primitives.greedy import farthest
from foveate.engine.primitives.ranking import centres, lattice, lattice_cells
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import VisualInputs


@dataclass(frozen=True, kw_only=True)
class Uniform(Reducer):
    """Needs nothing from the encoder."""

    group: ClassVar[Group] = "baselines"
    whole_grid: ClassVar[bool] = True

    def select(self, inputs: VisualInputs, k: int) -> Tensor:
        grid = inputs.grid
        coarse = lattice(grid, k)
        kept = lattice_cells(grid, coarse)
        ys, xs = torch.arange(grid.n_tokens) // grid.cols, torch.arange(grid.n_tokens) % grid.cols
        # Integer squared distances tie exactly. The distance to a lattice splits by axis: no [n, h*w] table is needed.
        dy = (ys[:, None] - centres(grid.rows, coarse.rows)).square().amin(1)
        dx = (xs[:, None] - centres(grid.cols, coarse.cols)).square().amin(1)

        def distance_from(cell: Tensor) -> Tensor:
            return (ys - ys[cell]).square() + (xs - xs[cell]).square()

        extra = farthest(dy + dx, distance_from, kept, k - coarse.n_tokens)
        return torch.cat([kept, extra]).sort().values


METHOD = Uniform
