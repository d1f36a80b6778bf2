"""ShowUI: on a screenshot, keep cells that differ from their surroundings, and few tokens of each plain area.

Source: Lin et al., 2024, arXiv:2411.17465 (released code: showlab/ShowUI), its UI-guided token selection.
Neighbouring cells whose pixels hardly differ form an area. A cell alone in its area is kept. Of every other area,
evenly spaced cells in reading order are kept. The method reads no features.
Departs from the paper: the share kept of an area follows from the budget; the paper keeps half. If there are fewer
tokens than areas, the areas that differ most from their surroundings (mean distance of a cell to its neighbours) keep
one token each. Tokens are dropped before the language model; in the paper they bypass some of its layers. Kept tokens
keep their positions. For every model, pixels are compared on the scale of Qwen2-VL's normalisation, its 28 x 28 cells
and the two equal frames that its preprocessing makes of a picture, so `delta` means the same for all models. A tiled
picture has two graphs: its thumbnail's, and the graph of its crops side by side.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.configs.errors import ConfigError
from foveate.engine.common import PIXELS, Grid, Signal, Tower
from foveate.engine.primitives.math import components, largest_remainder
from foveate.engine.primitives.ranking import centres, top
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import VisualInputs

_DEVIATION = (0.26862954, 0.26130258, 0.27577711)  # of red, green and blue, in Qwen2-VL's normalisation
_CELL = 28  # pixels along the edge of one token of Qwen2-VL
_FRAMES = 2  # Qwen2-VL's preprocessing makes a picture two equal frames, so every pixel counts twice in a distance


@dataclass(frozen=True, kw_only=True)
class ShowUI(Reducer):
    """Needs only the grid of the encoder."""

    source: ClassVar[str] = "arXiv:2411.17465"
    group: ClassVar[Group] = "by unlikeness or coverage"
    tile_aware: ClassVar[bool] = True

    delta: float = 1.0  # neighbours form one area if their normalised pixels are nearer than this

    def __post_init__(self) -> None:
        if not 0.0 <= self.delta <= 1000.0:
            raise ConfigError(f"delta: {self.delta} is not in [0, 1000]")

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({PIXELS})

    def select(self, inputs: VisualInputs, k: int) -> Tensor:
        label, unlike = self._areas(inputs)
        if inputs.places is not None:
            label, unlike = label[inputs.places.cpu()], unlike[inputs.places.cpu()]
        _, area, size = torch.unique(label, return_inverse=True, return_counts=True)
        mean = torch.zeros(len(size), dtype=torch.float64).index_add(0, area, unlike.double()) / size
        members = torch.sort(area, stable=True).indices.tolist()
        kept: list[int] = []
        first = 0
        for n, quota in zip(size.tolist(), quotas(size, mean, k), strict=True):
            kept += [members[first + i * (n - 1) // max(1, quota - 1)] for i in range(quota)]
            first += n
        return torch.tensor(sorted(kept))

    def _areas(self, inputs: VisualInputs) -> tuple[Tensor, Tensor]:
        """Each cell's area, int64, and mean distance to its neighbours, float32; the thumbnail's cells come first."""
        assert inputs.pixels is not None, "a method that reads pixels asks for them"
        grid, pixels = inputs.grid, inputs.pixels.cpu()
        parts = [Grid(grid.thumbnail, grid.thumbnail)] if grid.thumbnail else []
        labels: list[Tensor] = []
        unlike: list[Tensor] = []
        for first, part in zip((0, grid.n_thumbnail), [*parts, Grid(grid.rows, grid.cols)], strict=False):
            right, down = distances(pixels, part)
            labels.append(first + components(right < self.delta, down < self.delta))
            unlike.append(contrast(right, down))
        return torch.cat(labels), torch.cat(unlike)


def distances(pixels: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Pixel distances to the cell on the right [rows, cols - 1] and to the cell below [rows - 1, cols], float32.

    If a cell is not a whole number of pixels, all cells are sampled at the same number of pixels.
    """
    height, width = max(1, pixels.shape[0] // grid.rows), max(1, pixels.shape[1] // grid.cols)
    y, x = centres(pixels.shape[0], grid.rows * height), centres(pixels.shape[1], grid.cols * width)
    scale = _CELL * (_FRAMES / (height * width)) ** 0.5 / 255 / torch.tensor(_DEVIATION)
    cells = (pixels[y][:, x] * scale).view(grid.rows, height, grid.cols, width, 3)
    right = (cells[:, :, 1:] - cells[:, :, :-1]).square().sum((1, 3, 4)).sqrt()
    down = (cells[1:] - cells[:-1]).square().sum((1, 3, 4)).sqrt()
    return right, down


def contrast(right: Tensor, down: Tensor) -> Tensor:
    """[rows * cols] float32: each cell's mean distance to its neighbours; 0 for a cell without neighbours."""

    def around(right: Tensor, down: Tensor) -> Tensor:
        return pad(right, (1, 0)) + pad(right, (0, 1)) + pad(down, (0, 0, 1, 0)) + pad(down, (0, 0, 0, 1))

    n_neighbours = around(torch.ones_like(right), torch.ones_like(down))
    return (around(right, down) / n_neighbours.clamp(min=1)).flatten()


def quotas(size: Tensor, unlike: Tensor, k: int) -> list[int]:
    """Tokens that each area keeps: one, and more by its size; if k is below the number of areas, some keep none."""
    if k < len(size):
        chosen: list[int] = torch.zeros_like(size).index_fill(0, top(unlike, k), 1).tolist()
        return chosen
    spare = (size - 1).tolist()
    return [1 + more for more in largest_remainder(spare, k - len(size), spare)]


METHOD = ShowUI
