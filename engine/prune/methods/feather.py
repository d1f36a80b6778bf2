"""FEATHER: rank visual tokens without the rotation that favours a picture's bottom, and keep a coarse grid at first.

Source: Endo et al., 2024, arXiv:2412.13180 (released code: markendo/FEATHER).
The score is the last token's attention in the layer before, from queries and keys before RoPE, a softmax over the
visual tokens alone and a mean over heads. At the first point a grid of every third row and column stays whatever its
scores; at the second all compete.
Departs from it: the count is fixed beforehand, so the grid is kept and filled up to it with the best, where the paper
unites the best 30 % with the grid. The default shares are the paper's: 0.3 and the ninth of the other 0.7, then 0.09 of
those left. Where the grid would take more than half of the count, it is made coarser. Each picture has its own grid, by
its rows and columns; a thumbnail one more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common.grid import Grid
from foveate.engine.prune.base import Kept, Staged, best
from foveate.engine.prune.probe import Probe


@dataclass(frozen=True, kw_only=True)
class Feather(Staged):
    """The base and the length of RoPE change nothing in the score."""

    source: ClassVar[str] = "arXiv:2412.13180"
    paper: ClassVar[tuple[int, ...]] = (8, 16)
    depth: ClassVar[int] = 32

    shares: str = "0.378,0.034"
    stride: int = 3  # of the grid that stays at the first point; 0: none

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 0:
            raise ConfigError(f"stride: {self.stride} is not at least 0")

    def select(self, probe: Probe, counts: Sequence[int]) -> Kept:
        scores = probe.attention(probe.last, over="visual", rotated=False)[0]
        if self.stride and len(probe.visual) == sum(probe.entered):  # nothing has left yet
            for picture, count in enumerate(counts):
                mine = (probe.picture == picture).nonzero()[:, 0]
                on_grid = mine[self._on_grid(probe.grids[picture], probe.cell[mine], count // 2)]
                scores[on_grid] += 2  # above any attention
        return Kept(best(probe, scores, counts))

    def _on_grid(self, grid: Grid, cells: Tensor, most: int) -> Tensor:
        """[n] bool: which of the tokens at `cells` are on a grid of at most so many."""
        for stride in range(self.stride, max(grid.rows, grid.cols, grid.thumbnail) + 1):
            on_grid = torch.isin(cells, torch.tensor(_every(grid, stride), device=cells.device))
            if int(on_grid.sum()) <= most:
                return on_grid
        return torch.zeros(len(cells), dtype=torch.bool, device=cells.device)


def _every(grid: Grid, stride: int) -> list[int]:
    """Places of the cells of every so many rows and columns, of the thumbnail and of the whole."""
    places, first = grid.tokens(), grid.n_thumbnail
    parts = [(0, grid.thumbnail, grid.thumbnail), (first, grid.rows, grid.cols)]
    return [
        places[start + y * cols + x]
        for start, rows, cols in parts
        for y in range(0, rows, stride)
        for x in range(0, cols, stride)
    ]


METHOD = Feather
