"""The inputs of a method for a tiled picture: places on the grid, pixels of a tile, and missing signals."""

import pytest
import torch
from PIL import Image

from foveate.engine.common import Grid, ImageError, Tower, signals
from foveate.engine.images.anyres import Tiling, stack_tiles
from foveate.engine.vision import TokenTransform, VisualInputs

SIDE, CELL = 4, 5  # cells along a tile, pixels along a cell


def tiled(size: tuple[int, int], tile_rows: int, tile_cols: int) -> tuple[VisualInputs, torch.Tensor]:
    """A picture of `size` (height, width) pixels that its tiles show unscaled; each cell has its own colour.

    Returns:
        the inputs of a method, and the colours of the crops' cells, uint8 [rows, cols, 3].
    """
    edge = SIDE * CELL
    target = (tile_rows * edge, tile_cols * edge)
    tiling = Tiling.of(size, target, edge, SIDE)
    colours = torch.randint(1, 256, (tiling.rows, tiling.cols, 3), generator=torch.Generator().manual_seed(0))
    pixels = colours.to(torch.uint8).repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)
    assert pixels.shape[:2] == size, "the example is whole cells"
    stack = stack_tiles(Image.fromarray(pixels.numpy()), [target], edge, Image.Resampling.BICUBIC)
    raw = torch.frombuffer(bytearray(stack.tobytes()), dtype=torch.uint8).view(stack.height, stack.width, 3)
    grid = tiling.grid.bare
    return VisualInputs(grid=grid, proj=torch.zeros(grid.n_tokens, 2), pixels=raw), colours.to(torch.uint8)


SHAPES = [((30, 40), 2, 2), ((40, 20), 2, 2), ((10, 60), 1, 3), ((40, 20), 2, 1), ((60, 10), 3, 1)]


@pytest.mark.parametrize(("size", "tile_rows", "tile_cols"), SHAPES)
def test_a_tile_has_the_pixels_of_its_cells_without_the_black_around(
    size: tuple[int, int], tile_rows: int, tile_cols: int
) -> None:
    inputs, colours = tiled(size, tile_rows, tile_cols)
    thumbnail, *crops = inputs.grid.tiles
    assert inputs.pixels is not None
    assert torch.equal(inputs.of_tile(thumbnail).pixels, inputs.pixels[: SIDE * CELL])
    for crop in crops:
        found = inputs.of_tile(crop).pixels
        part = colours[crop.row0 : crop.row0 + crop.rows, crop.col0 : crop.col0 + crop.cols]
        assert torch.equal(found, part.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1))


def test_pixels_of_crops_that_are_scaled_down_are_the_picture_once() -> None:
    edge, size = SIDE * CELL, (60, 50)
    tiling = Tiling.of(size, (60, 60), edge, SIDE, most=2)
    assert tiling.is_scaled
    inputs = VisualInputs(
        grid=tiling.grid.bare,
        proj=torch.zeros(tiling.grid.bare.n_tokens, 2),
        pixels=torch.zeros(10 * edge, edge, 3, dtype=torch.uint8),
    )
    seen = [inputs.tile_pixels(tile) for tile in inputs.grid.tiles[1:]]
    area = sum(pixels.shape[0] * pixels.shape[1] for pixels in seen if pixels is not None)
    assert 0.8 * 60 * 50 < area <= 60 * 60


def test_places_on_the_grid_of_a_tiled_picture() -> None:
    grid = Grid(6, 8, thumbnail=2, row_cuts=(0, 3, 6), col_cuts=(0, 4, 8))
    inputs = VisualInputs(grid=grid, proj=torch.zeros(grid.n_tokens, 2))
    y, x = inputs.cell_yx
    assert y[4:].tolist() == [cell // 8 for cell in range(48)] and x[4:].tolist() == [cell % 8 for cell in range(48)]
    assert (y[:4].tolist(), x[:4].tolist()) == ([1, 1, 4, 4], [2, 6, 2, 6]), "the middles of its quarters"
    left = inputs.take(TokenTransform.selection(torch.tensor([1, 4, 51]), 52))
    assert [places.tolist() for places in left.cell_yx] == [[1, 0, 5], [6, 0, 7]]
    plain = VisualInputs(grid=Grid(2, 3), proj=torch.zeros(6, 2), places=None)
    assert [places.tolist() for places in plain.cell_yx] == [[0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]


def test_attention_between_all_tokens_of_a_tiled_picture_is_refused_in_words() -> None:
    inputs, _ = tiled((30, 40), 2, 2)
    tower = Tower(has_cls=True, depth=3)
    asked = tower.resolve(signals.qk())
    inputs = VisualInputs(grid=inputs.grid, proj=inputs.proj, tower=tower, taps={asked: torch.empty(2, 0, 1, 2, 4)})
    for given in (inputs, inputs.of_tile(inputs.grid.tiles[1])):
        with pytest.raises(ImageError, match="read in tiles"):
            given.full(-1)
