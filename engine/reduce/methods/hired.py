"""HiRED: share a tiled picture's budget by the early attention on its thumbnail, and keep each tile's most attended.

Source: Arif et al., 2024, arXiv:2408.10945 (released code: hasanar1f/HiRED).
The thumbnail gets `alpha` of the budget. The thumbnail's tokens that the CLS row attends to most at the first layer are
marked. Each crop gets a part of the remaining budget: the marks in its region, as a share of all marks. Within a tile,
the method keeps the tokens most attended to at the layer whose output the projector reads.
Departs from the paper: largest remainder rounds the shares, so no token of the budget is left over, and the thumbnail
keeps at least one token. Tokens that the crops cannot hold go to the thumbnail. The region of a crop is the part of the
thumbnail that shows the same. The released code cuts the reading order of the thumbnail into as many runs as there are
crops, so its regions are strips (`compat` restores them). A picture without tiles keeps its most attended tokens, as
FasterVLM does. Without a CLS row, the method reads attention received.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import Grid, Signal, Tile, Tower, signals
from foveate.engine.primitives.math import largest_remainder
from foveate.engine.primitives.ranking import saliency, top
from foveate.engine.reduce.base import Fits, Group, Reducer
from foveate.engine.vision import VisualInputs


@dataclass(frozen=True, kw_only=True)
class HiRed(Reducer):
    """Reads attention at two layers and no features."""

    source: ClassVar[str] = "arXiv:2408.10945"
    group: ClassVar[Group] = "by attention"
    fits: ClassVar[Fits] = "tiles"
    tile_aware: ClassVar[bool] = True

    alpha: float = 0.5  # the thumbnail's share of the budget, and the share of its tokens without a mark
    early_layer: float = 0.0  # the layer whose attention marks tokens, as a share of the depth
    compat: bool = False  # the regions are strips of the thumbnail, as released

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ConfigError(f"alpha: {self.alpha} is not in [0, 1]")
        if not 0.0 <= self.early_layer <= 1.0:
            raise ConfigError(f"early_layer: {self.early_layer} is not in [0, 1]")

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({signals.saliency(self.early_layer), signals.saliency()})

    def select(self, inputs: VisualInputs, k: int) -> Tensor:
        attention, grid = saliency(inputs).cpu(), inputs.grid
        if not grid.thumbnail or len(grid.tiles) == 1:
            return top(attention, k)
        thumbnail, *crops = [_rows_of(tile, inputs) for tile in grid.tiles]
        room = sum(len(rows) for rows in crops)
        first = min(max(int(k * self.alpha), k - room, 1), len(thumbnail))
        marks = self._marks(inputs, thumbnail)
        shares = largest_remainder(marks, k - first, [len(rows) for rows in crops])
        tiles = zip([thumbnail, *crops], [first, *shares], strict=True)
        return torch.cat([rows[top(attention[rows], n)] for rows, n in tiles]).sort().values

    def _marks(self, inputs: VisualInputs, thumbnail: Tensor) -> list[int]:
        """How many of the thumbnail's marked tokens each crop shows."""
        grid, side = inputs.grid, inputs.grid.thumbnail
        early = saliency(inputs, self.early_layer).cpu()[thumbnail]
        marked = thumbnail[top(early, int(len(thumbnail) * (1 - self.alpha)))]
        cells = marked if inputs.places is None else inputs.places.cpu()[marked]
        mark = torch.zeros(side * side, dtype=torch.int64).index_fill(0, cells, 1)
        if self.compat:
            return [int(mark[_strip(tile, grid)].sum()) for tile in grid.tiles[1:]]
        return [int(mark.view(side, side)[inputs.thumb_region(tile)].sum()) for tile in grid.tiles[1:]]


def _strip(tile: Tile, grid: Grid) -> slice:
    """The run of the thumbnail's reading order with the number of the crop."""
    across = max(1, len(grid.col_cuts) - 1)
    number, n = tile.tile_row * across + tile.tile_col, across * max(1, len(grid.row_cuts) - 1)
    return slice(grid.n_thumbnail * number // n, grid.n_thumbnail * (number + 1) // n)


def _rows_of(tile: Tile, inputs: VisualInputs) -> Tensor:
    """int64, increasing: the rows of one tile. Cells that an earlier method dropped have no row."""
    cells = torch.tensor(tile.cells())
    return cells if inputs.places is None else torch.isin(inputs.places.cpu(), cells).nonzero()[:, 0]


METHOD = HiRed
