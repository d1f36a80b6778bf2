"""PixelPrune: drop patches that only repeat their neighbours, blank ones above all, before the vision tower runs.

Source: Wang et al., 2026, arXiv:2604.00886 (released code: OPPO-Mente-Lab/PixelPrune).
Cells are predicted in raster order as JPEG-LS predicts pixels: from the left, but from above where the cell above left
is like the left one and unlike the one above, which is a vertical edge. What the prediction misses by more than `tau`
is kept, and stands for all that is predicted from it, so errors do not add up.
Departs from it: a budget is never exceeded, so of cells that are not repeated those best predicted go next, by their
mean error; and where the budget has room for more, repeated cells are left out all the same, unless the request wants
its pictures in full. `tau` is in grey levels, the paper's in shares of 255. Where the tower cannot be cut (pictures in
tiles, towers whose tokens are no patches) the same cells are dropped after it, exactly as many as the budget says.
Pixels beyond the last whole cell are not looked at. CLIP's CLS row is always read.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.configs.errors import ConfigError
from foveate.engine.common.grid import Grid
from foveate.engine.reduce.cut import PixelCut, Worth


@dataclass(frozen=True, kw_only=True)
class PixelPrune(PixelCut):
    """Reads pixels alone, so its result serves every question and every encoder."""

    source: ClassVar[str] = "arXiv:2604.00886"

    tau: int = 0  # grey levels by which a repeated cell may differ; 0: not at all
    metric: Literal["max", "mean"] = "max"  # over the values of a cell

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 255:
            raise ConfigError(f"tau: {self.tau} is not in 0..255")

    def worth(self, pixels: Tensor, grid: Grid) -> Worth:
        cells = cut_cells(pixels.cpu(), grid)
        error, is_new = self._exact(cells) if self.tau == 0 else self._anchored(cells)
        most = 256 * cells.shape[2]
        is_new[0, 0], error[0, 0] = True, most  # nothing predicts it
        return Worth((error + most * is_new).flatten(), int(is_new.sum()))

    def _exact(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """What predictions miss, [rows, cols] int64, and whether it is too much; a cell told exactly is itself."""
        right = _difference(cells[:, 1:], cells[:, :-1]).sum(-1, dtype=torch.int64)
        down = _difference(cells[1:], cells[:-1]).sum(-1, dtype=torch.int64)
        error = pad(right, (1, 0))
        error[1:, 0] = down[:, 0]
        edge = (down[:, :-1] == 0) & (right[:-1] != 0)
        error[1:, 1:] = torch.where(edge, down[:, 1:], right[1:])
        return error, error > 0

    def _anchored(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """The same with a tolerance: diagonal by diagonal, since a cell's prediction depends on earlier ones."""
        rows, cols, _ = cells.shape
        seen = cells.clone()  # what is known of each cell once only the kept ones are
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
        """[n] bool, of cells [n, values]."""
        difference = _difference(one, other)
        if self.metric == "max":
            return difference.amax(-1) <= self.tau
        return difference.sum(-1, dtype=torch.int64) <= self.tau * difference.shape[-1]


METHOD = PixelPrune


def _difference(one: Tensor, other: Tensor) -> Tensor:
    return torch.maximum(one, other) - torch.minimum(one, other)  # uint8 holds no sign


def cut_cells(pixels: Tensor, grid: Grid) -> Tensor:
    """uint8 [H, W, 3] -> [rows, cols, values] of its cells; a picture of fewer pixels than cells repeats its last."""
    height, width = max(1, pixels.shape[0] // grid.rows), max(1, pixels.shape[1] // grid.cols)
    y = torch.arange(grid.rows * height).clamp(max=pixels.shape[0] - 1)
    x = torch.arange(grid.cols * width).clamp(max=pixels.shape[1] - 1)
    cut = pixels[y][:, x].view(grid.rows, height, grid.cols, width, 3)
    return cut.transpose(1, 2).reshape(grid.rows, grid.cols, -1)
