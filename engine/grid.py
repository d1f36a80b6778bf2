"""The geometry of one image as the language model sees it. Imports nothing."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Grid:
    """Visual tokens of one image: `rows` x `cols` cells in raster (reading) order, index = y * cols + x."""

    rows: int
    cols: int

    @property
    def n_tokens(self) -> int:
        return self.rows * self.cols
