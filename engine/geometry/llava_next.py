"""The geometry of LLaVA-NeXT: a picture whole and, in finer tiles, again; rows of the tiles' cells end in newlines.

The thumbnail's tokens come first, then the crops' side by side, row by row, the padding left out.
"""

from typing import ClassVar

from foveate.engine.common import Grid, ImageError, ModelError, Section, Size
from foveate.engine.geometry.base import Checkpoint
from foveate.engine.geometry.llava import LlavaGeometry
from foveate.engine.images.anyres import Tiling, best_size


class LlavaNextGeometry(LlavaGeometry):
    family: ClassVar[str] = "llava_next"
    sizes: ClassVar[tuple[Size, ...]] = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        config, tower = checkpoint.config, self.tower
        self.most_tiles = self._most_tiles(config)
        sizes = config.pairs("image_grid_pinpoints", self.sizes)
        if sizes != self.processor.tile_sizes:
            raise ModelError(
                f"{config.where}: image_grid_pinpoints {list(sizes)} are not those of the image processor, "
                f"{list(self.processor.tile_sizes)}"
            )
        if tower.n_rows - self.n_skipped != tower.side**2:
            raise ModelError(
                f"{config.where}: vision_feature_select_strategy leaves {tower.n_rows - self.n_skipped} rows "
                f"of a tile, not its {tower.side} x {tower.side} cells"
            )

    def _most_tiles(self, config: Section) -> int | None:
        """About so many tiles of cells are read at most; None: as many as there are."""
        return None

    def tiling(self, original: Size) -> Tiling:
        """How a picture of that size is cut into tiles."""
        target = best_size(original, self.processor.tile_sizes)
        return Tiling.of(original, target, self.tower.image_size, self.tower.side, self.most_tiles)

    def grid(self, height: int, width: int, original: Size | None = None) -> Grid:
        tower = self.tower
        tiling = None if original is None else self.tiling(original)
        n_tiles = 1 if tiling is None else tiling.n_tiles
        if (height, width) != (n_tiles * tower.image_size, tower.image_size):
            raise ImageError(
                f"{height} x {width} pixels are not the {n_tiles} tiles of {tower.image_size} x {tower.image_size} "
                f"that a picture of {original} has"
            )
        return Grid(tower.side, tower.side, newlines="last") if tiling is None else tiling.grid

    def n_patches(self, height: int, width: int) -> int:
        return height // width * self.tower.n_rows


FAMILY = LlavaNextGeometry
