"""PixelPrune: before the vision tower runs, drop patches that repeat their neighbours, blank patches above all.

Source: Wang et al., 2026, arXiv:2604.00886 (released code: OPPO-Mente-Lab/PixelPrune).
The method predicts cells in raster order, as JPEG-LS predicts pixels. The prediction is the left cell. At a vertical
edge, the prediction is the cell above; an edge is where the cell above left is like the left cell and unlike the cell
above. A cell that differs from its prediction by more than `tau` is kept. A kept cell stands for all cells predicted
from it, so errors do not add up.
Departs from the paper: the budget is never exceeded. Of the cells that do not repeat, the best predicted cells are
dropped next, by their mean error. If the budget has room for more, repeated cells are dropped all the same, unless the
request wants its pictures in full. `tau` is in grey levels; the paper's is a share of 255. If the tower cannot be cut
(pictures in tiles, towers whose tokens are no patches), the same cells are dropped after the tower, exactly as many as
the budget says. Pixels beyond the last whole cell are not read. CLIP's CLS row always stays.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.configs.errors import ConfigError
from foveate.engine.common import Grid
from foveate.engine.reduce.cut import PixelCut, Worth


@dataclass(frozen=True, kw_only=True)
class PixelPrune(PixelCut):
    """Reads pixels alone, so one result serves every question and every encoder."""

    source: ClassVar[str] = "arXiv:2604.00886"

    tau: int = 0  # grey levels by which a repeated cell may differ; 0: not at all
    metric: Literal["max", "mean"] = "max"  # the largest or the mean difference over the values of a cell

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 255:
            raise ConfigError(f"tau: {self.tau} is not in 0..255")

    def worth(self, pixels: Tensor, grid: Grid) -> Worth:
        cells = cut_cells(pixels.cpu(), grid)
        error, is_new = self._exact(cells) if self.tau == 0 else self._anchored(cells)
        most = 256 * cells.shape[2]
        is_new[0, 0], error[0, 0] = True, most  # no cell predicts the first cell
        return Worth((error + most * is_new).flatten(), int(is_new.sum()))

    def _exact(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """The prediction error of each cell, [rows, cols] int64, and whether the error is above `tau`, which is 0."""
        right = _difference(cells[:, 1:], cells[:, :-1]).sum(-1, dtype=torch.int64)
        down = _difference(cells[1:], cells[:-1]).sum(-1, dtype=torch.int64)
        error = pad(right, (1, 0))
        error[1:, 0] = down[:, 0]
        edge = (down[:, :-1] == 0) & (right[:-1] != 0)
        error[1:, 1:] = torch.where(edge, down[:, 1:], right[1:])
        return error, error > 0

    def _anchored(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """The same with a tolerance: diagonal by diagonal, because a prediction depends on the cells kept before."""
        rows, cols, _ = cells.shape
        seen = cells.clone()  # each cell as the kept cells predict it
        error = torch.zeros(rows, cols, dtype=torch.int64)
        is_new = torch.zeros(rows, cols, dtype=torch.bool)
        for diagonal in range(rows + cols - 1):
            y = torch.arange(max(0, diagonal - cols + 1), min(rows, diagonal + 1))
            x = diagonal - y
            up, left = (y - 1).clamp(min=0), (x - 1).clamp(min=0)
            beside, above, corner = seen[y, left], seen[up, x], seen[up, left]
            edge = self._alike(corner, beside) & ~self._alike(corner, above)
            from_above = (x == 0) | ((y > 0) & edge)
            predicted = torch.where(from_above[:, None], above, beside)
            error[y, x] = _difference(cells[y, x], predicted).sum(-1, dtype=torch.int64)
            new = ~self._alike(cells[y, x], predicted)
            is_new[y, x] = new
            seen[y, x] = torch.where(new[:, None], cells[y, x], predicted)
        return error, is_new

    def _alike(self, one: Tensor, other: Tensor) -> Tensor:
        """[n] bool: whether cells [n, values] are equal within `tau`."""
        difference = _difference(one, other)
        if self.metric == "max":
            return difference.amax(-1) <= self.tau
        return difference.sum(-1, dtype=torch.int64) <= self.tau * difference.shape[-1]


METHOD = PixelPrune


def _difference(one: Tensor, other: Tensor) -> Tensor:
    return torch.maximum(one, other) - torch.minimum(one, other)  # uint8 has no sign


def cut_cells(pixels: Tensor, grid: Grid) -> Tensor:
    """From uint8 [H, W, 3] to cells [rows, cols, values]. With fewer pixels than cells, the last pixel repeats."""
    height, width = max(1, pixels.shape[0] // grid.rows), max(1, pixels.shape[1] // grid.cols)
    y = torch.arange(grid.rows * height).clamp(max=pixels.shape[0] - 1)
    x = torch.arange(grid.cols * width).clamp(max=pixels.shape[1] - 1)
    cut = pixels[y][:, x].view(grid.rows, height, grid.cols, width, 3)
    return cut.transpose(1, 2).reshape(grid.rows, grid.cols, -1)
