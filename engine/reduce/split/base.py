"""The split family: what a way of sharing reads of each part, and the arithmetic they all end in."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from foveate.engine.grid import Grid
from foveate.engine.reduce.budget import apportion

if TYPE_CHECKING:  # the arithmetic does without
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Part:
    """An image of a request, or a tile of an image."""

    n_tokens: int  # offered
    pixels: "Tensor | None" = None  # uint8 [H, W, 3], where the way asks for them
    attention: float | None = None  # of a tile: its share of the thumbnail's attention; of the thumbnail: 1


class Split(ABC):
    """A way of sharing. A file binds its subclass, which has no settings, to `METHOD`."""

    needs_pixels: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = False  # of the thumbnail; only within a tiled image

    @abstractmethod
    def weights(self, parts: Sequence[Part]) -> list[int]:
        """What each part weighs, at least 1; the budget is shared in proportion, between 1 and what it offers."""


def share(split: Split, parts: Sequence[Part], grid: Grid, budget: int) -> list[int]:
    """Tokens of each tile of an image, `budget` in all; what is fewer than one for each goes to the first alone."""
    offered = [tile.rows * tile.cols for tile in grid.tiles]
    if budget < len(offered):
        return [budget, *[0] * (len(offered) - 1)]
    return apportion(split.weights(parts), offered, budget)


def tile_parts(grid: Grid) -> list[Part]:
    """The tiles of a tiled image by their geometry alone."""
    return [Part(n_tokens=tile.rows * tile.cols) for tile in grid.tiles]
