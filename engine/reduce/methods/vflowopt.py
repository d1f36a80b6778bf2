"""VFlowOpt: keep the tokens that the most attended tokens attend to, and merge the others square by square.

Source: Yang et al., 2025, arXiv:2508.05211 (released code: sihany077/VFlowOpt).
The importance of a token is the attention that it gets from the most attended tokens: those that receive several times
the mean. The entropy of a token's pixels can be added. The least important tokens are dropped. The dropped tokens of
one square of cells become one row: their mean, weighted by importance, in the place of the most important of them. So
no token is lost.
Departs from the paper: this is only the stage before the language model. The paper searches layers, square and weights
offline; here they are settings. Squares begin at 4 x 4 cells and are as small as half of the budget can hold. Exactly
the budget is left; the paper leaves about as much. Rows are mixed before the projector if the encoder gives rows before
the projector. If no token stands out, and in a picture of tiles, which do not attend to each other, importance is
attention received. Entropy is that of true grey values over a cell; the released code wraps normalised values.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import ENC, PIXELS, Signal, Tower, signals
from foveate.engine.primitives.merge import merge_into
from foveate.engine.primitives.ranking import finite
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import TokenTransform, VisualInputs

_LEAST = 1e-12  # least importance, so that a square of unattended tokens is their plain mean
_GREYS = 256


@dataclass(frozen=True, kw_only=True)
class VFlowOpt(Reducer):
    """Every source token is in exactly one output row. Thumbnail and crops share the budget by importance."""

    source: ClassVar[str] = "arXiv:2508.05211"
    group: ClassVar[Group] = "by attention"
    tile_aware: ClassVar[bool] = True

    threshold: float = 7.0  # tokens above this many times the mean attention received give importance to others
    entropy: float = 0.0  # weight of the entropy of pixels; attention weighs 1; both sum to 1 over a picture
    side: int = 4  # least number of cells along the edge of a square
    layer: int = -1  # the layer whose attention is read

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 10_000.0:
            raise ConfigError(f"threshold: {self.threshold} is not in [0, 10000]")
        if not 0.0 <= self.entropy <= 1000.0:
            raise ConfigError(f"entropy: {self.entropy} is not in [0, 1000]")
        if not 1 <= self.side <= 1000:
            raise ConfigError(f"side: {self.side} is not in [1, 1000]")

    def needs(self, tower: Tower) -> frozenset[Signal]:
        asked = frozenset({signals.recv(self.layer), signals.qk(self.layer), ENC})
        return asked | {PIXELS} if self.entropy else asked

    def transform(self, inputs: VisualInputs, k: int) -> TokenTransform:
        importance = self.importance(inputs).cpu()
        order = torch.sort(importance, descending=True, stable=True).indices.flip(0)  # the least important first
        square, side = _squares(inputs, k, self.side)
        dropped = order[: _n_dropped(square[order], k, inputs.n // side**2)]
        ranks = torch.arange(len(dropped))
        best = torch.full((inputs.n,), -1).scatter_reduce_(0, square[dropped], ranks, "amax")
        into = torch.arange(inputs.n).index_copy_(0, dropped, dropped[best[square[dropped]]])
        return merge_into(into, importance.clamp(min=_LEAST), inputs.space)

    def importance(self, inputs: VisualInputs) -> Tensor:
        """[n] float32, at least 0."""
        importance = finite("attention weights", inputs.recv(self.layer))
        asked = (importance > self.threshold * importance.mean()).nonzero()[:, 0]
        if len(asked) and len(inputs.grid.tiles) == 1:
            importance = finite("attention weights", inputs.rows(self.layer, asked)).mean(0)
        return importance + self.entropy * _texture(inputs).to(importance.device) if self.entropy else importance


def _squares(inputs: VisualInputs, k: int, side: int) -> tuple[Tensor, int]:
    """The square of each row, int64 [n] numbered from 0, and its side.

    The side is the least, from `side` on, with at most k / 2 squares; it ends at the longest side of the picture.
    """
    grid, at = inputs.grid, torch.arange(inputs.n) if inputs.places is None else inputs.places.cpu()
    in_crops = at >= grid.n_thumbnail
    local = torch.where(in_crops, at - grid.n_thumbnail, at)
    cols = torch.where(in_crops, grid.cols, max(grid.thumbnail, 1))
    y, x = local // cols, local % cols
    longest = max(grid.rows, grid.cols, grid.thumbnail)
    if k == 1:  # thumbnail and crops share the one row
        return torch.zeros_like(at), longest
    while True:
        key = (in_crops * longest + y // side) * longest + x // side
        names, square = torch.unique(key, return_inverse=True)
        if 2 * len(names) <= k or side >= longest:
            return square, side
        side += 1


def _n_dropped(squares: Tensor, k: int, n_squares: int) -> int:
    """Number of tokens to drop, so that the kept tokens and one row for each square of dropped tokens make k rows.

    Args:
        squares: [n] int64, the square of each token, the least important first; at most k different ones.
        n_squares: the number of tokens that the paper drops beyond n - k.
    """
    n = len(squares)
    first = torch.full((n,), n).scatter_reduce_(0, squares, torch.arange(n), "amin")
    opened = torch.zeros(n, dtype=torch.int64).index_fill_(0, first[first < n], 1).cumsum(0)
    left = n - torch.arange(1, n + 1) + opened  # rows left if the first 1, 2, ... n are dropped
    fitting = (left == k).nonzero()[:, 0] + 1
    return min(max(n - k + n_squares, int(fitting[0])), int(fitting[-1]))


def _texture(inputs: VisualInputs) -> Tensor:
    """[n] float32: softmax over each tile of the entropy, in bits, of the grey values in each cell."""
    texture = torch.zeros(inputs.grid.bare.n_tokens)
    for tile in inputs.grid.tiles:
        seen = inputs.tile_pixels(tile)
        assert seen is not None, "a method that asks for pixels gets them"
        grey = seen.cpu().float().mean(2).round().long()
        texture[torch.tensor(tile.cells())] = _entropy(grey, tile.rows, tile.cols).softmax(0)
    return texture if inputs.places is None else texture[inputs.places.cpu()]


def _entropy(grey: Tensor, rows: int, cols: int) -> Tensor:
    """[rows * cols] float32, in bits, of grey values int64 [height, width]."""
    y, x = (torch.arange(size) * n // size for size, n in zip(grey.shape, (rows, cols), strict=True))
    cell = y[:, None] * cols + x
    counts = torch.bincount((cell * _GREYS + grey).flatten(), minlength=rows * cols * _GREYS).view(-1, _GREYS).float()
    bits: Tensor = torch.special.entr(counts / counts.sum(1, keepdim=True).clamp(min=1)).sum(1) / math.log(2)
    return bits


METHOD = VFlowOpt
