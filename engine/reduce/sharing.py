"""The split family: what a way of sharing reads of each part, and the arithmetic they all end in."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from foveate.engine.common.grid import Grid
from foveate.engine.reduce.budget import apportion
from foveate.engine.vision.inputs import VisualInputs


@dataclass(frozen=True, kw_only=True)
class Part:
    """An image of a request, or a tile of an image."""

    n_tokens: int  # offered
    pixels: Tensor | None = None  # uint8 [H, W, 3], where the way asks for them
    attention: float | None = None  # of a tile: its share of the thumbnail's attention; of the thumbnail: 1


class Split(ABC):
    """A way of sharing. A file binds its subclass, which has no settings, to `METHOD`."""

    needs_pixels: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = False  # of the thumbnail; only within a tiled image

    @abstractmethod
    def weights(self, parts: Sequence[Part]) -> list[int]:
        """What each part weighs, at least 1; the budget is shared in proportion, between 1 and what it offers."""


class Area(Split):
    """In proportion to the visual tokens offered, so every part is seen at one resolution. The default."""

    def weights(self, parts: Sequence[Part]) -> list[int]:
        return [part.n_tokens for part in parts]


AREA = Area()


def share(split: Split, parts: Sequence[Part], grid: Grid, budget: int) -> list[int]:
    """Tokens of each tile of an image, `budget` in all; what is fewer than one for each goes to the first alone."""
    offered = [tile.rows * tile.cols for tile in grid.tiles]
    if budget < len(offered):
        return [budget, *[0] * (len(offered) - 1)]
    return apportion(split.weights(parts), offered, budget)


def tile_parts(grid: Grid) -> list[Part]:
    """The tiles of a tiled image by their geometry alone."""
    return [Part(n_tokens=tile.rows * tile.cols) for tile in grid.tiles]


def parts_of(inputs: VisualInputs, split: Split) -> list[Part]:
    """The tiles of a tiled picture, as `split` wants to see them."""
    parts, tiles = tile_parts(inputs.grid), inputs.grid.tiles
    if split.needs_pixels:
        parts = [replace(p, pixels=inputs.tile_pixels(t)) for p, t in zip(parts, tiles, strict=True)]
    if split.needs_attention and inputs.grid.thumbnail:
        thumb = inputs.of_tile(tiles[0])
        mass = thumb.saliency().double().view(thumb.grid.rows, thumb.grid.cols)
        regions = [float(mass[inputs.thumb_region(tile)].sum()) for tile in tiles[1:]]
        parts = [replace(p, attention=a) for p, a in zip(parts, [sum(regions), *regions], strict=True)]
    return parts
