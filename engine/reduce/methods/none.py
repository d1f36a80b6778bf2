"""None: keep every visual token; the dense model, bit for bit.

A budget below what the images offer contradicts it and is refused before it gets here (`engine.reduce.budget.split`).
"""

from dataclasses import dataclass
from typing import ClassVar

from foveate.engine.common.grid import Grid
from foveate.engine.reduce.base import Group, Reducer


@dataclass(frozen=True, kw_only=True)
class Keep(Reducer):
    """Opts out of reduction."""

    group: ClassVar[Group] = "baselines"
    whole_grid: ClassVar[bool] = True
    tile_aware: ClassVar[bool] = True

    def count(self, grid: Grid, budget: int) -> int:
        return grid.n_tokens


METHOD = Keep
