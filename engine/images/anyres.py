"""Cut a picture of any shape into square tiles, and count the cells that the language model reads (AnyRes, LLaVA-NeXT).

A picture is resized, its aspect kept, into the one of a list of sizes that loses least of it, surrounded by black,
and cut into tiles: the crops. Before them stands the thumbnail, the whole picture squeezed into one tile. Of the
crops, laid side by side, the cells that show black alone are dropped again. Shared by the server, which cuts, and the
engine, which counts. Pillow and arithmetic; the latter operation by operation as in `transformers`, whose roundings
decide how many tokens a picture has.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from PIL import Image

from foveate.engine.common import Grid, ImageError, Size


def best_size(size: Size, sizes: Sequence[Size]) -> Size:
    """The size among `sizes` that shows most pixels of a picture of `size`; among equal sizes, the smallest margin."""
    height, width = size

    def shown(target: Size) -> int:
        scale = min(target[1] / width, target[0] / height)
        return min(int(width * scale) * int(height * scale), height * width)

    return max(sizes, key=lambda target: (shown(target), shown(target) - target[0] * target[1]))


def fitted(size: Size, target: Size) -> Size:
    """The largest size of a picture within `target` that keeps the aspect ratio."""
    (height, width), (most_rows, most_cols) = size, target
    by_width, by_height = most_cols / width, most_rows / height
    if by_width < by_height:
        return min(math.ceil(height * by_width), most_rows), most_cols
    return most_rows, min(math.ceil(width * by_height), most_cols)


def stack_tiles(image: Image.Image, sizes: Sequence[Size], side: int, resample: Image.Resampling) -> Image.Image:
    """The thumbnail and the crops of an RGB picture, `side` pixels square, one above the other."""
    size = (image.height, image.width)
    rows, cols = best_size(size, sizes)
    height, width = fitted(size, (rows, cols))
    canvas = Image.new("RGB", (cols, rows))
    canvas.paste(image.resize((width, height), resample), ((cols - width) // 2, (rows - height) // 2))
    corners = list(product(range(0, rows, side), range(0, cols, side)))
    stack = Image.new("RGB", (side, side * (1 + len(corners))))
    stack.paste(image.resize((side, side), resample))
    for i, (top, left) in enumerate(corners):
        stack.paste(canvas.crop((left, top, left + side, top + side)), (0, (1 + i) * side))
    return stack


@dataclass(frozen=True, slots=True)
class Tiling:
    """The cells of a picture's tiles that the language model reads. Every tile has `side` x `side` cells."""

    side: int
    tile_rows: int  # of crops
    tile_cols: int
    rows: int  # cells of all crops side by side, those in the padding left out
    cols: int
    out_rows: int  # of the same, scaled down where there would be too many
    out_cols: int

    @classmethod
    def of(cls, size: Size, target: Size, pixels: int, side: int, most: int | None = None) -> "Tiling":
        """The tiling of a picture of `size` that was cut into tiles at `target`.

        Args:
            pixels: the edge of a tile.
            side: cells along it.
            most: about so many tiles of cells are read at most; more are scaled down.

        Raises:
            ImageError: the picture is so long and thin that no whole row or column of cells shows it.
        """
        tile_rows, tile_cols = target[0] // pixels, target[1] // pixels
        rows, cols = _without_padding(size, (tile_rows * side, tile_cols * side))
        ratio = math.sqrt(rows * cols / (most * side**2)) if most is not None else 1.0
        out = (int(rows // ratio), int(cols // ratio)) if ratio > 1.1 else (rows, cols)
        if min(out) < 1:
            raise ImageError(f"a picture of {size[1]} x {size[0]} pixels is too long and thin to be seen; crop it")
        return cls(side, tile_rows, tile_cols, rows, cols, *out)

    @property
    def n_tiles(self) -> int:
        """Number of tiles, with the thumbnail."""
        return 1 + self.tile_rows * self.tile_cols

    @property
    def is_scaled(self) -> bool:
        return (self.out_rows, self.out_cols) != (self.rows, self.cols)

    @property
    def grid(self) -> Grid:
        """The grid as the language model reads the picture, with newlines."""
        return Grid(
            self.out_rows,
            self.out_cols,
            thumbnail=self.side,
            newlines="rows",
            row_cuts=_cuts(self.tile_rows, self.side, self.rows, self.out_rows),
            col_cuts=_cuts(self.tile_cols, self.side, self.cols, self.out_cols),
        )

    def cells(self) -> list[tuple[int, int]]:
        """(tile, cell of the tile) of the thumbnail's cells, then of those in `rows` x `cols`, in reading order."""
        top, left = (self.tile_rows * self.side - self.rows) // 2, (self.tile_cols * self.side - self.cols) // 2
        ys = [divmod(y, self.side) for y in range(top, top + self.rows)]
        xs = [divmod(x, self.side) for x in range(left, left + self.cols)]
        crops = [(1 + i * self.tile_cols + j, y * self.side + x) for i, y in ys for j, x in xs]
        return [*((0, cell) for cell in range(self.side**2)), *crops]


def _without_padding(size: Size, cells: Size) -> Size:
    """Rows and columns of `cells` that show a picture of `size`; both edges lose equally many cells."""
    (height, width), (rows, cols) = size, cells
    if width / height > cols / rows:
        return rows - (rows - int(round(height * (cols / width), 7))) // 2 * 2, cols
    return rows, cols - (cols - int(round(width * (rows / height), 7))) // 2 * 2


def _cuts(n_tiles: int, side: int, n: int, n_out: int) -> tuple[int, ...]:
    """Borders of the crops among `n_out` cells, to which `n` cells without padding were scaled; a middle decides."""
    padding = (n_tiles * side - n) // 2
    owners = [((2 * i + 1) * n // (2 * n_out) + padding) // side for i in range(n_out)]
    return tuple(sum(owner < tile for owner in owners) for tile in range(n_tiles + 1))
