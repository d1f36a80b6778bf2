"""GlobalCom2: share a tiled picture's budget by its thumbnail's attention, and keep each crop's most attended tokens.

Source: Liu et al., 2025, arXiv:2501.05179 (released code: xuyang-liu16/GlobalCom2).
Attention here is attention before the softmax, as released: the products of CLS's query and the keys, mean over heads.
The thumbnail keeps the budget's share of its tokens: the tokens that the CLS row attends to most. The softmax of the
summed attention on each crop's region of the thumbnail raises or lowers the share of the crop. The rank of a crop's
token is the sum of its own attention and the thumbnail's attention, resized to the crops' cells; each of the two has
unit length within the crop.
Departs from the paper: largest remainder rounds the shares, so they meet the budget, and the thumbnail keeps at least
one token. The region of a crop is the part of the thumbnail that shows the same, and the sum over a region is scaled to
the mean size of the regions, because values before a softmax have no natural zero. The released code cuts the thumbnail
into equal blocks even if crops lost padding (`compat` restores that). Kept tokens of the thumbnail stay in reading
order. Attention is that of the layer whose output the projector reads; the released code reads the layer after. A
picture without tiles keeps its most attended tokens. Without a CLS row, the logarithm of attention received stands for
attention before the softmax.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import Grid, Signal, Tile, Tower, signals
from foveate.engine.primitives.math import largest_remainder
from foveate.engine.primitives.ranking import finite, top
from foveate.engine.reduce.base import Fits, Group, Reducer
from foveate.engine.vision import VisualInputs


@dataclass(frozen=True, kw_only=True)
class GlobalCom2(Reducer):
    """Reads one attention row per tile and no features."""

    source: ClassVar[str] = "arXiv:2501.05179"
    group: ClassVar[Group] = "by attention"
    fits: ClassVar[Fits] = "tiles"
    tile_aware: ClassVar[bool] = True

    temperature: float = 10.0  # temperature of the softmax over crops; lower: the shares differ more
    compat: bool = False  # the regions are equal blocks of the thumbnail, as released, and sums are not scaled

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature <= 1e6:
            raise ConfigError(f"temperature: {self.temperature} is not in (0, 1e6]")

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({signals.logits()})

    def select(self, inputs: VisualInputs, k: int) -> Tensor:
        attention, grid = finite("attention weights", inputs.logits()).cpu(), inputs.grid
        if not grid.thumbnail or len(grid.tiles) == 1:
            return top(attention, k)
        places = torch.arange(inputs.n) if inputs.places is None else inputs.places.cpu()
        thumbnail, *crops = [torch.isin(places, torch.tensor(tile.cells())).nonzero()[:, 0] for tile in grid.tiles]
        least = float(attention[thumbnail].min()) if len(thumbnail) else 0.0  # for what an earlier method dropped
        guide = torch.full((grid.n_thumbnail,), least).index_copy_(0, places[thumbnail], attention[thumbnail])
        guide = guide.view(1, 1, grid.thumbnail, grid.thumbnail)
        first = min(max(len(thumbnail) * k // inputs.n, 1), len(thumbnail))
        room = [len(rows) for rows in crops]
        shares = largest_remainder(self._weights(inputs, guide[0, 0], room), k - first, room)
        size = (grid.rows, grid.cols)
        shown = torch.nn.functional.interpolate(guide, size, mode="bilinear", align_corners=False).flatten()
        kept = [thumbnail[top(attention[thumbnail], first)]]
        for rows, n in zip(crops, shares, strict=True):
            score = _of_length_1(attention[rows]) + _of_length_1(shown[places[rows] - grid.n_thumbnail])
            kept.append(rows[top(score, n)])
        return torch.cat(kept).sort().values

    def _weights(self, inputs: VisualInputs, guide: Tensor, room: list[int]) -> list[float]:
        """The weight of each crop: its tokens, raised or lowered by the attention on its region."""
        grid = inputs.grid
        crops, guide = grid.tiles[1:], guide.double()
        if self.compat:
            mass = torch.stack([guide[_block(tile, grid)].sum() for tile in crops])
        else:
            shown = [guide[inputs.thumb_region(tile)] for tile in crops]  # may be empty for a sliver of a crop
            mean = torch.stack([part.mean() if part.numel() else guide.mean() for part in shown])
            mass = mean * guide.numel() / len(crops)
        p = ((mass - mass.max()) / self.temperature).softmax(0)
        weights: list[float] = (torch.tensor(room) * (1 + p - p.mean())).tolist()
        return weights


def _of_length_1(scores: Tensor) -> Tensor:
    return torch.nn.functional.normalize(scores, dim=0)


def _block(tile: Tile, grid: Grid) -> tuple[slice, slice]:
    """Rows and columns of the crop's block. Blocks are equal; the last block of an axis takes the remainder."""
    down, across, side = max(1, len(grid.row_cuts) - 1), max(1, len(grid.col_cuts) - 1), grid.thumbnail
    top_row, left = tile.tile_row * (side // down), tile.tile_col * (side // across)
    bottom = side if tile.tile_row == down - 1 else top_row + side // down
    right = side if tile.tile_col == across - 1 else left + side // across
    return slice(top_row, bottom), slice(left, right)


METHOD = GlobalCom2
