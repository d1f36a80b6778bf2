"""FEATHER: keep the most attended visual tokens, without RoPE's bias to a picture's bottom, and at first a coarse grid.

Source: Endo et al., 2024, arXiv:2412.13180 (released code: markendo/FEATHER).
The score is the last token's attention in the layer before, from queries and keys before RoPE, with a softmax over the
visual tokens alone, as a mean over heads. At the first point a grid of every third row and column stays, whatever its
scores. At the second point all tokens compete.
Departs from the paper: the count is fixed beforehand. So the grid is kept, and the best tokens fill the count; the
paper unites the best 30 % with the grid. The default shares are the paper's: 0.3 plus the ninth of the other 0.7, then
0.09 of the tokens left. If the grid would take more than half of the count, the grid is made coarser. Each picture has
its own grid, by its rows and columns, and a thumbnail has one more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import Grid
from foveate.engine.prune.base import Kept, Staged, best
from foveate.engine.prune.probe import Probe


@dataclass(frozen=True, kw_only=True)
class Feather(Staged):
    """The score does not depend on the base or the length of RoPE."""

    source: ClassVar[str] = "arXiv:2412.13180"
    paper: ClassVar[tuple[int, ...]] = (8, 16)
    depth: ClassVar[int] = 32

    shares: str = "0.378,0.034"
    stride: int = 3  # stride of the grid that stays at the first point; 0: no grid

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 0:
            raise ConfigError(f"stride: {self.stride} is not at least 0")

    def select(self, probe: Probe, counts: Sequence[int]) -> Kept:
        scores = probe.attention(probe.last, over="visual", rotated=False)[0]
        if self.stride and len(probe.visual) == sum(probe.entered):  # no token has been dropped yet
            for picture, count in enumerate(counts):
                mine = (probe.picture == picture).nonzero()[:, 0]
                on_grid = mine[self._on_grid(probe.grids[picture], probe.cell[mine], count // 2)]
                scores[on_grid] += 2  # above any attention
        return Kept(best(probe, scores, counts))

    def _on_grid(self, grid: Grid, cells: Tensor, most: int) -> Tensor:
        """[n] bool: whether each token at `cells` is on the finest grid of at most `most` tokens."""
        for stride in range(self.stride, max(grid.rows, grid.cols, grid.thumbnail) + 1):
            on_grid = torch.isin(cells, torch.tensor(_every(grid, stride), device=cells.device))
            if int(on_grid.sum()) <= most:
                return on_grid
        return torch.zeros(len(cells), dtype=torch.bool, device=cells.device)


def _every(grid: Grid, stride: int) -> list[int]:
    """Places of the cells on every `stride`-th row and column, of the thumbnail and of the whole picture."""
    places, first = grid.tokens(), grid.n_thumbnail
    parts = [(0, grid.thumbnail, grid.thumbnail), (first, grid.rows, grid.cols)]
    return [
        places[start + y * cols + x]
        for start, rows, cols in parts
        for y in range(0, rows, stride)
        for x in range(0, cols, stride)
    ]


METHOD = Feather
