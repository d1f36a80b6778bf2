"""Pool: average neighbouring tokens into a coarser grid.

The method pools the projector's rows by adaptive averages to the most even h x w <= budget (`ranking.lattice`). Block i
of an axis of n cells spans floor(i n / h) to ceil((i + 1) n / h). If h does not divide n, neighbouring blocks share a
cell. The method keeps h * w tokens, which may be fewer than the budget. A pooled row takes the position of the cell in
its middle.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.engine.common import Grid
from foveate.engine.primitives.math import pool_blocks
from foveate.engine.primitives.ranking import lattice, lattice_cells
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import TokenTransform, VisualInputs, starts


@dataclass(frozen=True, kw_only=True)
class Pool(Reducer):
    """Needs nothing from the encoder."""

    group: ClassVar[Group] = "baselines"
    whole_grid: ClassVar[bool] = True

    def count(self, grid: Grid, budget: int) -> int:
        return lattice(grid, min(budget, grid.n_tokens)).n_tokens

    def transform(self, inputs: VisualInputs, k: int) -> TokenTransform:
        grid = inputs.grid
        coarse = lattice(grid, k)
        block_y, y = pool_blocks(grid.rows, coarse.rows)
        block_x, x = pool_blocks(grid.cols, coarse.cols)
        block = (block_y[:, None] * coarse.cols + block_x).flatten()
        by_block = torch.sort(block, stable=True).indices  # cells of one block stay in reading order
        size = torch.bincount(block, minlength=k)
        return TokenTransform(
            n_in=grid.n_tokens,
            indptr=starts(size),
            indices=(y[:, None] * grid.cols + x).flatten()[by_block],
            weights=(1.0 / size).repeat_interleave(size),
            anchor=lattice_cells(grid, coarse),
            size=size,
        )


METHOD = Pool
