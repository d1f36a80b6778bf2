"""LLaVA-NeXT: LLaVA that reads a picture whole and, in finer tiles, again; rows of the tiles' cells end in newlines.

Source: https://llava-vl.github.io/blog/2024-01-30-llava-next/.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from foveate.engine.common import Grid, Signal, Size
from foveate.engine.geometry.llava_next import LlavaNextGeometry
from foveate.engine.images.anyres import Tiling
from foveate.engine.models.llava import Llava
from foveate.engine.models.parts.tower import Taps, normalise
from foveate.engine.vision import VisualInputs


class LlavaNext(Llava):
    """Signals are each tile's own, those of a CLS row too; `cls` is the thumbnail's."""

    geometry: LlavaNextGeometry

    def __init__(self, geometry: LlavaNextGeometry, device: torch.device) -> None:
        super().__init__(geometry, device)
        self.image_newline = nn.Parameter(torch.empty(geometry.spec.hidden_size))

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
            cells = first + torch.arange(self.geometry.n_skipped, tower.n_rows)
            return replace(self._inputs(grid.bare, first, cells, hidden, taps), newline=self.image_newline)
        tiling = self.geometry.tiling(original)
        tile, cell = torch.tensor(tiling.cells()).T
        cells = first + tile * tower.n_rows + self.geometry.n_skipped + cell
        inputs = self._inputs(tiling.grid.bare, first, cells, hidden, taps)
        inputs = self._scaled(inputs, tiling) if tiling.is_scaled else inputs
        return replace(inputs, newline=self.image_newline)

    def _scaled(self, inputs: VisualInputs, tiling: Tiling) -> VisualInputs:
        raise AssertionError("only a family that limits its tiles scales them down")


FAMILY = LlavaNext
