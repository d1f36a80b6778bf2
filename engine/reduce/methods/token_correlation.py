"""Token-level Correlation: keep more of the tiles whose tokens repeat less, and in each the tokens that stand alone.

Source: Zhang et al., 2024, arXiv:2407.14439 (the authors have released no code).
A token like many others of its tile is redundant; the share of the others is the tile's density of information, and
says how much of the tile is kept. Among them attention decides: the most attended to, or, where a few outliers have
almost all attention, a draw in proportion to it.
Departs from it: its constants are choices of ours: like is a cosine above 0.9, many is a tenth of the
tile, the density is at least 0.05, an outlier has ten times the mean. The budget is met exactly: what the tiles ask
for, a thumbnail for all of its tokens, is scaled to it; in a tile the tokens that are not redundant come first, then
the others. Tokens are compared as the last layer of the tower leaves them; without a CLS row, attention received is
read.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.primitives.math import largest_remainder
from foveate.engine.primitives.ranking import saliency, unit
from foveate.engine.reduce.base import Fits, Group, Reducer
from foveate.engine.vision import signals
from foveate.engine.vision.inputs import VisualInputs
from foveate.engine.vision.signals import Signal, Tower


@dataclass(frozen=True, kw_only=True)
class TokenCorrelation(Reducer):
    """Made for documents in crops; a picture without tiles is one tile."""

    source: ClassVar[str] = "arXiv:2407.14439"
    group: ClassVar[Group] = "by unlikeness or coverage"
    fits: ClassVar[Fits] = "tiles"
    tile_aware: ClassVar[bool] = True

    similarity: float = 0.9  # cosine above which two tokens are alike
    crowd: float = 0.1  # share of its tile that a redundant token is like
    floor: float = 0.05  # least density of information
    dominance: float = 10.0  # times the mean attention, above which outliers dominate a tile

    def __post_init__(self) -> None:
        for name in ("similarity", "crowd", "floor"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name}: {getattr(self, name)} is not in [0, 1]")
        if not 1.0 <= self.dominance <= 1e6:
            raise ConfigError(f"dominance: {self.dominance} is not in [1, 1000000]")

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({signals.saliency(), signals.hidden()})

    def select(self, inputs: VisualInputs, k: int) -> Tensor:
        rows, attention = unit(inputs.hidden()), saliency(inputs)
        draw = torch.rand(inputs.n, generator=torch.Generator().manual_seed(inputs.seed)).to(attention.device)
        tiles = _tiles(inputs)
        redundant = [self.redundant(rows[tile]) for tile in tiles]
        asked = [self.asked(of_tile) for of_tile in redundant]
        if inputs.grid.thumbnail:
            asked[0] = len(tiles[0])
        shares = largest_remainder(asked, k, [len(tile) for tile in tiles])
        kept = [
            tile[self.order(attention[tile], of_tile, draw[tile])[:share]]
            for tile, of_tile, share in zip(tiles, redundant, shares, strict=True)
        ]
        return torch.cat(kept).sort().values

    def redundant(self, rows: Tensor) -> Tensor:
        """[m] bool: which rows ([m, C] of length 1, of one tile) are like many others."""
        alike = (rows @ rows.T > self.similarity).fill_diagonal_(False)
        return alike.sum(1) >= max(self.crowd * len(rows), 1)

    def asked(self, redundant: Tensor) -> int:
        """How many tokens a tile asks for."""
        n = len(redundant)
        return max(n - int(redundant.sum()), math.ceil(self.floor * n))

    def order(self, attention: Tensor, redundant: Tensor, draw: Tensor) -> Tensor:
        """[m] int64: a tile's tokens, those to be kept first; `draw` is uniform in [0, 1)."""
        if bool(attention.max() > self.dominance * attention.mean()):
            # The largest of logarithm plus Gumbel noise are a draw in proportion, none twice.
            attention = attention.log() - (-draw.log()).log()
        best = torch.sort(attention, descending=True, stable=True).indices
        return best[torch.sort(redundant[best], stable=True).indices]


def _tiles(inputs: VisualInputs) -> list[Tensor]:
    """Of each tile its rows that are left, int64 on the device of the features."""
    places = torch.arange(inputs.n) if inputs.places is None else inputs.places.cpu()
    row_of = torch.full((inputs.grid.n_tokens,), -1).index_copy_(0, places, torch.arange(inputs.n))
    found = [row_of[torch.tensor(tile.cells())] for tile in inputs.grid.tiles]
    return [rows[rows >= 0].to(inputs.proj.device) for rows in found]


METHOD = TokenCorrelation
