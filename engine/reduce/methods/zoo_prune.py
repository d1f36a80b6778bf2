"""ZOO-Prune: keep tokens to which the projector is sensitive and that differ from each other.

Source: Kim et al., 2025, arXiv:2509.24837 (the released code is a stub).
The sensitivity of a token is how much the projector's output moves when the token moves a little in random directions,
by central differences, scaled to 0..1. The most sensitive token is kept first. Each next token has the largest product
of sensitivity and cosine distance to the nearest kept token.
Departs from the paper: the method takes 3 directions; the paper takes 64. Each direction costs two passes of all tokens
through the projector. The directions are the same for all tokens, so chance moves all sensitivities alike and the order
of tokens does not matter. The step is 0.01, the paper's, in float32. Narrower types would round that step away, so
their step is the cube root of their resolution. If sensitivities are within 2 % of each other, or if there is no
projector to run (after a method that mixed its output, or if pictures are scaled down behind it), all tokens count the
same, and diversity decides alone. Patches that become one token move together.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import CELLS, Signal, Tower
from foveate.engine.primitives.greedy import greedy
from foveate.engine.primitives.ranking import finite, norm01, unit
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import VisualInputs

_FLAT = 0.02  # differences below this share of the largest are noise of sampling and rounding


@dataclass(frozen=True, kw_only=True)
class ZooPrune(Reducer):
    """Needs no attention weights and no text. Kept sets are nested: a smaller budget keeps a subset."""

    source: ClassVar[str] = "arXiv:2509.24837"
    group: ClassVar[Group] = "by unlikeness or coverage"

    directions: int = 3  # number of random directions; the paper's: 64
    step: float = 0.01  # how far a token moves, times a direction of standard normal numbers

    def __post_init__(self) -> None:
        if not 1 <= self.directions <= 256:
            raise ConfigError(f"directions: {self.directions} is not in [1, 256]")
        if not 1e-4 <= self.step <= 10.0:
            raise ConfigError(f"step: {self.step} is not in [0.0001, 10]")

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({CELLS})

    def select(self, inputs: VisualInputs, k: int) -> Tensor:
        """Cost: 2 * directions passes of the projector, n^2 * D multiply-adds, then k passes over n numbers."""
        rows = unit(inputs.proj)
        worth, similarity = self.sensitivity(inputs), rows @ rows.T
        nearest = torch.full_like(worth, -1.0)  # the largest cosine with a kept token

        def after(pick: Tensor) -> Tensor:
            nonlocal nearest
            nearest = torch.maximum(nearest, similarity.index_select(0, pick)[0])
            return worth * (1 - nearest).clamp(min=0)

        return greedy(worth, after, torch.empty(0, dtype=torch.int64, device=rows.device), k).sort().values

    def sensitivity(self, inputs: VisualInputs) -> Tensor:
        """[n] float32 in 0..1."""
        cells, project = inputs.cells, inputs.project
        if cells is None or project is None:
            return torch.ones(inputs.n, device=inputs.proj.device)
        step = max(self.step, torch.finfo(cells.dtype).eps ** (1 / 3))
        draw = torch.Generator().manual_seed(inputs.seed)
        moves = step * torch.randn(self.directions, cells.shape[1], generator=draw).to(cells.device)
        moved = torch.zeros(inputs.n, device=cells.device)
        for move in moves.unbind():
            ends = torch.cat([cells.float() + move, cells.float() - move]).to(cells.dtype)
            up, down = project(ends).float().chunk(2)
            moved += (up - down).norm(dim=1)
        moved = finite("features", moved)
        flat = moved.max() - moved.min() <= _FLAT * moved.max()
        return torch.where(flat, torch.ones_like(moved), norm01(moved / (2 * step * self.directions)))


METHOD = ZooPrune
