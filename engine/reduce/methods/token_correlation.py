"""Token-level Correlation: keep more of the tiles whose tokens repeat less, and in each tile the unrepeated tokens.

Source: Zhang et al., 2024, arXiv:2407.14439 (the authors have released no code).
A token that resembles many others of its tile is redundant. The share of the other tokens is the tile's information
density, which says how much of the tile is kept. Among the other tokens attention decides: the most attended tokens are
kept, or, if a few outliers have almost all attention, a draw in proportion to attention.
Departs from the paper: the constants are choices of ours. Tokens are alike above a cosine of 0.9; many is a tenth of
the tile; the density is at least 0.05; an outlier has ten times the mean attention. The method meets the budget
exactly: the counts that the tiles ask for are scaled to the budget, and a thumbnail asks for all of its tokens. In a
tile, the tokens that are not redundant come first, then the redundant ones. Tokens are compared as the last layer of
the tower leaves them. Without a CLS row, the method reads attention received.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import Signal, Tower, signals
from foveate.engine.primitives.math import largest_remainder
from foveate.engine.primitives.ranking import saliency, unit
from foveate.engine.reduce.base import Fits, Group, Reducer
from foveate.engine.vision import VisualInputs


@dataclass(frozen=True, kw_only=True)
class TokenCorrelation(Reducer):
    """Made for documents in crops; a picture without tiles is one tile."""

    source: ClassVar[str] = "arXiv:2407.14439"
    group: ClassVar[Group] = "by unlikeness or coverage"
    fits: ClassVar[Fits] = "tiles"
    tile_aware: ClassVar[bool] = True

    similarity: float = 0.9  # cosine above which two tokens are alike
    crowd: float = 0.1  # least share of its tile that a redundant token resembles
    floor: float = 0.05  # least information density
    dominance: float = 10.0  # an outlier that dominates its tile has more than this many times the mean attention

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
        """[m] bool: which rows ([m, C] of length 1, of one tile) resemble many others."""
        alike = (rows @ rows.T > self.similarity).fill_diagonal_(False)
        return alike.sum(1) >= max(self.crowd * len(rows), 1)

    def asked(self, redundant: Tensor) -> int:
        """Number of tokens that a tile asks for."""
        n = len(redundant)
        return max(n - int(redundant.sum()), math.ceil(self.floor * n))

    def order(self, attention: Tensor, redundant: Tensor, draw: Tensor) -> Tensor:
        """[m] int64: a tile's tokens, the first to keep first; `draw` is uniform in [0, 1)."""
        if bool(attention.max() > self.dominance * attention.mean()):
            # The largest sums of logarithm and Gumbel noise are a draw in proportion, without replacement.
            attention = attention.log() - (-draw.log()).log()
        best = torch.sort(attention, descending=True, stable=True).indices
        return best[torch.sort(redundant[best], stable=True).indices]


def _tiles(inputs: VisualInputs) -> list[Tensor]:
    """The rows left of each tile, int64 on the device of the features."""
    places = torch.arange(inputs.n) if inputs.places is None else inputs.places.cpu()
    row_of = torch.full((inputs.grid.n_tokens,), -1).index_copy_(0, places, torch.arange(inputs.n))
    found = [row_of[torch.tensor(tile.cells())] for tile in inputs.grid.tiles]
    return [rows[rows >= 0].to(inputs.proj.device) for rows in found]


METHOD = TokenCorrelation
