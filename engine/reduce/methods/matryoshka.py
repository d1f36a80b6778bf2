"""Matryoshka: average the picture over nested scales, each with a quarter of the tokens of the one before.

Source: Cai et al., 2024, arXiv:2405.17430 (M3; released code: mu-cai/matryoshka-mm).
The rows that the language model would read are pooled in square blocks, so that a coarse row is the mean of four finer
ones: 576, 144, 36, 9 and 1 of a 24 x 24 grid. The paper trains a model on all scales at once; one that was not trained
so bears mild pooling only.
Departs from it: the scale is the largest within the budget, where the paper's user names it; a grid of any size is
halved until one cell is left, a side that is one cell long stays so, and what halving an odd side leaves over joins the
last block, where pooling with a stride would drop it; a row takes the position of the cell in the middle of its block.
"""

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.engine.common.grid import Grid
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision.inputs import VisualInputs
from foveate.engine.vision.transform import TokenTransform


@dataclass(frozen=True, kw_only=True)
class Matryoshka(Reducer):
    """Looks at nothing. Keeps as many tokens as a scale has: often fewer than the budget, down to a quarter of it."""

    source: ClassVar[str] = "arXiv:2405.17430"
    group: ClassVar[Group] = "baselines"
    whole_grid: ClassVar[bool] = True

    def count(self, grid: Grid, budget: int) -> int:
        return halved(grid, halvings(grid, budget)).n_tokens

    def transform(self, inputs: VisualInputs, k: int) -> TokenTransform:
        grid, times = inputs.grid, halvings(inputs.grid, k)
        coarse = halved(grid, times)
        y, middle_y = blocks(grid.rows, coarse.rows, times)
        x, middle_x = blocks(grid.cols, coarse.cols, times)
        owner = (y[:, None] * coarse.cols + x).flatten()
        anchor = (middle_y[:, None] * grid.cols + middle_x).flatten()
        return TokenTransform.merging(owner, anchor)


def halved(grid: Grid, times: int) -> Grid:
    return Grid(max(1, grid.rows >> times), max(1, grid.cols >> times))


def halvings(grid: Grid, budget: int) -> int:
    """How often the grid is halved before it fits the budget, which is at least 1."""
    return next(times for times in itertools.count() if halved(grid, times).n_tokens <= budget)


def blocks(n: int, m: int, times: int) -> tuple[Tensor, Tensor]:
    """Of an axis of n cells in m blocks of 2^times, the last with the rest: each cell's block, each block's middle."""
    start = torch.arange(m) << times
    end = torch.cat([start[1:], torch.tensor([n])])
    return (torch.arange(n) >> times).clamp(max=m - 1), (start + end) // 2


METHOD = Matryoshka
