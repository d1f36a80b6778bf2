"""AIM, stage 2: layer by layer, keep the visual tokens that a walk along the attention graph visits most.

Source: Zhong et al., 2024, arXiv:2412.03248 (released code: LaVi-Lab/AIM), the pruning inside the language model. The
merging before the language model is the reducer `aim`; `aim+aim2` is both.
The walk starts anywhere in the prompt and follows the attention of the layer before, sharpened by a temperature, five
times. The score of a token is the root mean square over heads. Shares fall in a straight line from all tokens at half
of the decoder to none at about four fifths: the released layers 14 and 22 of 28.
Departs from the paper: each point costs one more block table. So the paper's eight falls are joined into at most
`max_points` points with the same mean over layers; `max_points=8` is the released schedule. Each picture keeps its own
share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.configs.errors import ConfigError
from foveate.engine.prune.base import Kept, Pruner, best
from foveate.engine.prune.probe import Probe
from foveate.engine.prune.schedule import Point, of_table


@dataclass(frozen=True, kw_only=True)
class AIM2(Pruner):
    """Each step of the walk computes the products of all queries and keys once more."""

    source: ClassVar[str] = "arXiv:2412.03248"

    start: float = 0.5  # share of the depth up to which all tokens stay
    end: float = 22 / 28  # share of the depth from which on no visual token stays
    max_points: int = 4  # largest number of layers at which tokens are dropped
    temperature: float = 0.1  # temperature of the attention that the walk follows
    steps: int = 5  # steps of the walk
    damping: float = 0.0  # share of the walk that starts again at each step; as released, none

    def __post_init__(self) -> None:
        if not 0.0 <= self.start < self.end <= 1.0:
            raise ConfigError(f"start: {self.start} and end: {self.end} are not 0 <= start < end <= 1")
        if self.max_points < 1:
            raise ConfigError(f"max_points: {self.max_points} is not at least 1")
        if not 0.01 <= self.temperature <= 100.0:
            raise ConfigError(f"temperature: {self.temperature} is not in [0.01, 100]")
        if not 1 <= self.steps <= 20:
            raise ConfigError(f"steps: {self.steps} is not in [1, 20]")
        if not 0.0 <= self.damping <= 1.0:
            raise ConfigError(f"damping: {self.damping} is not in [0, 1]")

    def points(self, n_layers: int) -> tuple[Point, ...]:
        end = max(1, min(n_layers - 1, round(self.end * n_layers)))
        start = min(round(self.start * n_layers), end - 1)
        table = [1 - min(1.0, max(0, layer - start) / (end - start)) for layer in range(n_layers)]
        return of_table(table, self.max_points, exact_mean=True)

    def select(self, probe: Probe, counts: Sequence[int]) -> Kept:
        view = probe.views("before")
        anywhere = 1 / (view.m + probe.n)
        walk = torch.full((view.q.shape[1], probe.n), anywhere, device=probe.rows.device)
        for _ in range(self.steps):
            walk = (1 - self.damping) * view.propagate(walk, self.temperature) + self.damping * anywhere
        return Kept(best(probe, walk.square().mean(0).sqrt()[probe.visual], counts))


METHOD = AIM2
