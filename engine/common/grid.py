"""The geometry of one image as the language model sees it. Imports nothing of ours, no torch."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

Newlines = Literal["none", "rows", "last"]
Size = tuple[int, int]  # (height, width) of a picture in pixels


@dataclass(frozen=True, slots=True)
class Tile:
    """A rectangle of cells that the tower read as one picture. Padding gives no cells.

    Cell (y, x) of the tile is row `offset + y * stride + x` of the image's visual rows, newlines not counted.
    """

    kind: Literal["thumbnail", "crop"]
    rows: int
    cols: int
    tile_row: int  # the crop's place among the crops; 0, 0 for the thumbnail
    tile_col: int
    row0: int  # its first cell among the image's rows x cols cells; 0, 0 for the thumbnail
    col0: int
    offset: int
    stride: int

    @property
    def grid(self) -> "Grid":
        """The tile as an image of its own."""
        return Grid(self.rows, self.cols)

    def cells(self) -> list[int]:
        """Rows of the tile among the image's visual rows, in reading order."""
        starts = range(self.offset, self.offset + self.rows * self.stride, self.stride)
        return [start + x for start in starts for x in range(self.cols)]


@dataclass(frozen=True, slots=True)
class Grid:
    """Visual tokens of one image: `rows` x `cols` cells in raster (reading) order, index = y * cols + x.

    An image in tiles has more: before those cells, which are its crops side by side without their padding, the square
    `thumbnail` x `thumbnail` of the whole image; and, where it is read unreduced, newlines. A reducer is given the
    cells alone (`bare`): every one of its rows comes from pixels.
    """

    rows: int
    cols: int
    thumbnail: int = 0  # cells along an edge; 0: none
    newlines: Newlines = "none"  # tokens after each of the `rows`, or one after all of them; none after the thumbnail
    row_cuts: tuple[int, ...] = ()  # crop i is rows [row_cuts[i], row_cuts[i + 1]), of which padding may leave none
    col_cuts: tuple[int, ...] = ()

    @property
    def n_tokens(self) -> int:
        n_newlines = {"none": 0, "rows": self.rows, "last": 1}[self.newlines]
        return self.n_thumbnail + self.rows * self.cols + n_newlines

    @property
    def n_thumbnail(self) -> int:
        """Visual rows before the first of the `rows` x `cols` cells."""
        return self.thumbnail**2

    @property
    def bare(self) -> "Grid":
        """The grid without newlines: a reducer chooses among these cells."""
        return self if self.newlines == "none" else replace(self, newlines="none")

    def tokens(self) -> list[int]:
        """The place of each cell among the `n_tokens`; cells of the thumbnail come first."""
        first, end = self.n_thumbnail, self.n_thumbnail + self.rows * self.cols
        skipped = int(self.newlines == "rows")
        return [*range(first), *(cell + skipped * ((cell - first) // self.cols) for cell in range(first, end))]

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """The thumbnail if there is one, then the crops that have cells, in reading order; never empty."""
        side, first = self.thumbnail, self.n_thumbnail
        thumbnail = (Tile("thumbnail", side, side, 0, 0, 0, 0, 0, side),) if side else ()
        crops = (
            Tile("crop", bottom - top, right - left, i, j, top, left, first + top * self.cols + left, self.cols)
            for i, (top, bottom) in enumerate(pairwise(self.row_cuts or (0, self.rows)))
            for j, (left, right) in enumerate(pairwise(self.col_cuts or (0, self.cols)))
            if bottom > top and right > left
        )
        return (*thumbnail, *crops)
