"""None: keep every visual token; the dense model, bit for bit.

The server refuses a budget below the offered tokens before the request comes here (`engine.reduce.budget.split`).
"""

from dataclasses import dataclass
from typing import ClassVar

from foveate.engine.common import Grid
from foveate.engine.reduce.base import Group, Reducer


@dataclass(frozen=True, kw_only=True)
class Keep(Reducer):
    """Keeps all tokens."""

    group: ClassVar[Group] = "baselines"
    whole_grid: ClassVar[bool] = True
    tile_aware: ClassVar[bool] = True

    def count(self, grid: Grid, budget: int) -> int:
        return grid.n_tokens


METHOD = Keep
