"""LLaVA-NeXT: LLaVA that reads a picture whole and, in finer tiles, again; rows of the tiles' cells end in newlines.

The thumbnail's tokens come first, then the crops' side by side, row by row, the padding left out (`engine.anyres`).
Source: https://llava-vl.github.io/blog/2024-01-30-llava-next/.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from foveate.engine.common.errors import ImageError, ModelError
from foveate.engine.common.grid import Grid
from foveate.engine.common.section import Section
from foveate.engine.images.anyres import Size, Tiling, best_size
from foveate.engine.models.llava import Llava
from foveate.engine.models.parts.family import Source
from foveate.engine.models.parts.pixels import normalise
from foveate.engine.models.parts.taps import Taps
from foveate.engine.vision.inputs import VisualInputs
from foveate.engine.vision.signals import Signal


class LlavaNext(Llava):
    """Signals are each tile's own, those of a CLS row too; `cls` is the thumbnail's."""

    family = "llava_next"
    sizes: tuple[Size, ...] = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.image_newline = nn.Parameter(torch.empty(self.spec.hidden_size))
        self.most_tiles = self._most_tiles(source.config)
        tower = self.vision_tower.config
        sizes = source.config.pairs("image_grid_pinpoints", self.sizes)
        if sizes != self.processor.tile_sizes:
            raise ModelError(
                f"{source.config.where}: image_grid_pinpoints {list(sizes)} are not those of the image processor, "
                f"{list(self.processor.tile_sizes)}"
            )
        if tower.n_rows - self.n_skipped != tower.side**2:
            raise ModelError(
                f"{source.config.where}: vision_feature_select_strategy leaves {tower.n_rows - self.n_skipped} rows "
                f"of a tile, not its {tower.side} x {tower.side} cells"
            )

    def _most_tiles(self, config: Section) -> int | None:
        """About so many tiles of cells are read at most; None: as many as there are."""
        return None

    def _tiling(self, original: Size) -> Tiling:
        tower = self.vision_tower.config
        target = best_size(original, self.processor.tile_sizes)
        return Tiling.of(original, target, tower.image_size, tower.side, self.most_tiles)

    def grid(self, height: int, width: int, original: Size | None = None) -> Grid:
        tower = self.vision_tower.config
        tiling = None if original is None else self._tiling(original)
        n_tiles = 1 if tiling is None else tiling.n_tiles
        if (height, width) != (n_tiles * tower.image_size, tower.image_size):
            raise ImageError(
                f"{height} x {width} pixels are not the {n_tiles} tiles of {tower.image_size} x {tower.image_size} "
                f"that a picture of {original} has"
            )
        return Grid(tower.side, tower.side, newlines="last") if tiling is None else tiling.grid

    def n_patches(self, height: int, width: int) -> int:
        return height // width * self.vision_tower.config.n_rows

    def encode(
        self, images: Sequence[Tensor], signals: frozenset[Signal], originals: Sequence[Size | None] | None = None
    ) -> list[VisualInputs]:
        tower = self.vision_tower.config
        tiles = [tile for image in images for tile in torch.split(image, tower.image_size)]
        hidden, taps = self.vision_tower([normalise(tile, self.processor) for tile in tiles], signals)
        inputs, first = [], 0
        for image, original in zip(images, originals or [None] * len(images), strict=True):
            inputs.append(self._picture(original, first * tower.n_rows, hidden, taps))
            first += image.shape[0] // tower.image_size
        return inputs

    def _picture(self, original: Size | None, first: int, hidden: Tensor, taps: Taps) -> VisualInputs:
        """The picture whose tiles begin at row `first` of the tower's."""
        tower = self.vision_tower.config
        if original is None:
            grid = Grid(tower.side, tower.side, newlines="last")
            cells = first + torch.arange(self.n_skipped, tower.n_rows)
            return replace(self._inputs(grid.bare, first, cells, hidden, taps), newline=self.image_newline)
        tiling = self._tiling(original)
        tile, cell = torch.tensor(tiling.cells()).T
        cells = first + tile * tower.n_rows + self.n_skipped + cell
        inputs = self._inputs(tiling.grid.bare, first, cells, hidden, taps)
        inputs = self._scaled(inputs, tiling) if tiling.is_scaled else inputs
        return replace(inputs, newline=self.image_newline)

    def _scaled(self, inputs: VisualInputs, tiling: Tiling) -> VisualInputs:
        raise AssertionError("only a family that limits its tiles scales them down")


FAMILY = LlavaNext
