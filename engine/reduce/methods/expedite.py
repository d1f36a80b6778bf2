"""Expedite: run the tower's middle layers on clusters of rows, and restore all rows before the next method.

Source: Liang et al., 2022, arXiv:2210.01035 (released code: Expedit-LargeScale-Vision-Transformer).
After a start layer, the method clusters the rows around a coarse grid by local k-means: a row joins one of the 3 x 3
centres around it. The middle layers run on the clusters. After a stop layer, each row becomes a mean of the clusters
nearest to its state before clustering. `expedite;keep=0.5+divprune` runs the middle layers on half as many rows, and
DivPrune chooses among all rows.
Departs from the paper: as the last method of a composition, it restores nothing, because the budget says how many rows
there may be. A row joins one cluster only, the nearest of 3 x 3; the released code shares a row out over the 5 x 5
centres around it by a softmax of the distances (the nearest centres of both are the same for 61 to 98 % of the rows, by
its temperature). The row in the middle of a cluster's part of the grid always joins that cluster, so no cluster is
empty and each cluster has a place. Weights of the restored rows are relative to the mean
squared distance, so one `sharpness` suits every tower. If the tower cannot be cut, there is nothing to speed up: with a
method after it, the method does nothing.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import Grid, Tower
from foveate.engine.primitives.ranking import finite, lattice, lattice_cells
from foveate.engine.reduce.cut import EncoderCut, whole_layer
from foveate.engine.vision import TokenTransform, VisualInputs


@dataclass(frozen=True, kw_only=True)
class Expedite(EncoderCut):
    """Reads the rows. The clusters form a grid, so there may be fewer clusters than the budget."""

    source: ClassVar[str] = "arXiv:2210.01035"
    whole_grid: ClassVar[bool] = True
    restores: ClassVar[bool] = True

    start: float = 0.25  # the layer after which rows are clustered, as a share of the depth
    stop: float = 0.75  # the layer after which all rows are restored, as a share of the depth
    rounds: int = 5  # rounds of k-means
    near: int = 20  # number of clusters in the mean of a restored row
    sharpness: float = 8.0  # the larger, the more the nearest clusters weigh in the mean

    def __post_init__(self) -> None:
        if not 0.0 <= self.start <= self.stop <= 1.0:
            raise ConfigError(f"start: {self.start} and stop {self.stop} are not in order in [0, 1]")
        for name, value, most in (("rounds", self.rounds, 100), ("near", self.near, 1000)):
            if not 1 <= value <= most:
                raise ConfigError(f"{name}: {value} is not in 1..{most}")
        if not 0.0 <= self.sharpness <= 1000.0:
            raise ConfigError(f"sharpness: {self.sharpness} is not in [0, 1000]")

    def count(self, grid: Grid, budget: int) -> int:
        return lattice(grid, min(budget, grid.n_tokens)).n_tokens

    def layers(self, tower: Tower) -> tuple[int, ...]:
        return (whole_layer(tower, self.start),)

    def back_layer(self, tower: Tower) -> int:
        return whole_layer(tower, self.stop)

    def cut(self, inputs: VisualInputs, k: int, layer: int, size: Tensor) -> TokenTransform:
        rows = finite("features", inputs.proj)
        coarse = lattice(inputs.grid, k)
        anchor = lattice_cells(inputs.grid, coarse)
        home, around = _around(inputs.grid, coarse)
        owner = home.index_copy(0, anchor, torch.arange(k))
        for _ in range(self.rounds):
            where, n_members = owner.to(rows.device), torch.bincount(owner, minlength=k).to(rows.device)
            centres = rows.new_zeros(k, rows.shape[1]).index_add_(0, where, rows) / n_members[:, None]
            distance = torch.stack([(rows - centres[c]).square().sum(1) for c in around.to(rows.device).unbind(1)], 1)
            owner = around.gather(1, distance.cpu().argmin(1, keepdim=True))[:, 0]
            owner = owner.index_copy(0, anchor, torch.arange(k))
        return TokenTransform.merging(owner, anchor, space=inputs.space)

    def spread(self, rows: Tensor, reduced: Tensor) -> Tensor:
        rows, reduced = rows.float(), reduced.float()
        distance = torch.cdist(rows, reduced, compute_mode="donot_use_mm_for_euclid_dist").square()
        near = distance.topk(min(self.near, len(reduced)), largest=False)
        scale = near.values.mean().clamp(min=1e-12)
        weights = (-self.sharpness * near.values / scale).softmax(1)
        return torch.zeros_like(distance).scatter_(1, near.indices, weights)


METHOD = Expedite


def _around(grid: Grid, coarse: Grid) -> tuple[Tensor, Tensor]:
    """The coarse cell of each cell, [n] int64, and the 3 x 3 coarse cells around it, [n, 9]; edge cells repeat."""
    y = torch.arange(grid.rows) * coarse.rows // grid.rows
    x = torch.arange(grid.cols) * coarse.cols // grid.cols
    steps = torch.arange(-1, 2)
    ys, xs = (y[:, None] + steps).clamp(0, coarse.rows - 1), (x[:, None] + steps).clamp(0, coarse.cols - 1)
    around = ys[:, None, :, None] * coarse.cols + xs[None, :, None, :]
    return (y[:, None] * coarse.cols + x).flatten(), around.flatten(0, 1).flatten(1)
