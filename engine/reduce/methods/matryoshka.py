"""Matryoshka: keep the largest of nested scales that fits; each scale averages four tokens of the scale before.

Source: Cai et al., 2024, arXiv:2405.17430 (M3; released code: mu-cai/matryoshka-mm).
The method pools the rows that the language model would read in square blocks. A coarse row is the mean of four finer
rows: the scales of a 24 x 24 grid have 576, 144, 36, 9 and 1 tokens. The paper trains a model on all scales at once. A
model without this training bears mild pooling only.
Departs from the paper: the scale is the largest within the budget; in the paper the user names the scale. A grid of any
size is halved until one cell is left, and a side of one cell stays one cell. When an odd side is halved, the last block
takes the remaining cell; pooling with a stride would drop that cell. A row takes the position of the cell in the middle
of its block.
"""

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.engine.common import Grid
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import TokenTransform, VisualInputs


@dataclass(frozen=True, kw_only=True)
class Matryoshka(Reducer):
    """Reads no signal. Keeps the tokens of one scale: often fewer than the budget, down to a quarter of the budget."""

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
    """Number of halvings until the grid fits the budget; the budget is at least 1."""
    return next(times for times in itertools.count() if halved(grid, times).n_tokens <= budget)


def blocks(n: int, m: int, times: int) -> tuple[Tensor, Tensor]:
    """The block of each of n cells, and the middle of each of m blocks of 2^times cells; the last takes the rest."""
    start = torch.arange(m) << times
    end = torch.cat([start[1:], torch.tensor([n])])
    return (torch.arange(n) >> times).clamp(max=m - 1), (start + end) // 2


METHOD = Matryoshka
