"""ShowUI: keep what is unlike its surroundings on a screen, and few tokens of each plain area.

Source: Lin et al., 2024, arXiv:2411.17465 (released code: showlab/ShowUI), its UI-guided token selection.
Cells whose pixels hardly differ from those of a neighbour form an area; a cell alone is kept, and of every area evenly
spaced ones are, in reading order. The features do not matter.
Departs from it: the share kept of an area follows from the budget, where the paper keeps half; where there are fewer
tokens than areas, those most unlike their surroundings (mean distance of a cell to its neighbours) keep one each.
Tokens are dropped before the language model, where the paper lets them bypass some of its layers; those kept keep
their positions. Pixels are compared on the scale of Qwen2-VL's normalisation and its 28 x 28 cells whatever the model,
so that `delta` means the same for all. A tiled picture has two graphs, its thumbnail's and that of its crops side by
side.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.configs.errors import ConfigError
from foveate.engine.common.grid import Grid
from foveate.engine.primitives.math import components, largest_remainder
from foveate.engine.primitives.ranking import centres, top
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision.inputs import VisualInputs
from foveate.engine.vision.signals import PIXELS, Signal, Tower

_DEVIATION = (0.26862954, 0.26130258, 0.27577711)  # of red, green and blue, by which Qwen2-VL divides
_CELL = 28  # pixels along the edge of one of its tokens


@dataclass(frozen=True, kw_only=True)
class ShowUI(Reducer):
    """Needs nothing from the encoder but its grid."""

    source: ClassVar[str] = "arXiv:2411.17465"
    group: ClassVar[Group] = "by unlikeness or coverage"
    tile_aware: ClassVar[bool] = True

    delta: float = 1.0  # distance of normalised pixels below which neighbours are one area

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
        """Of each cell, thumbnail first: the area it is in, int64, and how unlike its neighbours it is, float32."""
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
    """How far each cell's pixels are from those right of it [rows, cols - 1] and below it [rows - 1, cols], float32.

    Cells that are no whole number of pixels are sampled, each at equally many.
    """
    height, width = max(1, pixels.shape[0] // grid.rows), max(1, pixels.shape[1] // grid.cols)
    y, x = centres(pixels.shape[0], grid.rows * height), centres(pixels.shape[1], grid.cols * width)
    scale = _CELL / (height * width) ** 0.5 / 255 / torch.tensor(_DEVIATION)
    cells = (pixels[y][:, x] * scale).view(grid.rows, height, grid.cols, width, 3)
    right = (cells[:, :, 1:] - cells[:, :, :-1]).square().sum((1, 3, 4)).sqrt()
    down = (cells[1:] - cells[:-1]).square().sum((1, 3, 4)).sqrt()
    return right, down


def contrast(right: Tensor, down: Tensor) -> Tensor:
    """[rows * cols] float32: each cell's mean distance to its neighbours; 0 where it has none."""

    def around(right: Tensor, down: Tensor) -> Tensor:
        return pad(right, (1, 0)) + pad(right, (0, 1)) + pad(down, (0, 0, 1, 0)) + pad(down, (0, 0, 0, 1))

    n_neighbours = around(torch.ones_like(right), torch.ones_like(down))
    return (around(right, down) / n_neighbours.clamp(min=1)).flatten()


def quotas(size: Tensor, unlike: Tensor, k: int) -> list[int]:
    """How many tokens each area keeps: one, and more by what it has beyond one; some none if k is fewer than areas."""
    if k < len(size):
        chosen: list[int] = torch.zeros_like(size).index_fill(0, top(unlike, k), 1).tolist()
        return chosen
    spare = (size - 1).tolist()
    return [1 + more for more in largest_remainder(spare, k - len(size), spare)]


METHOD = ShowUI
