"""P-Sigmoid: keep visual tokens by FastV's ranking; the shares fall over the layers as a sigmoid of two parameters.

Source: Zhao et al., 2024, arXiv:2412.00556 (abstract alone read): G-Search has one number per layer; this method has 1
/ (1 + exp(alpha (layer / n_layers - beta))), scaled to a budget. `foveate tune` fits both numbers.
Departs from the paper: shares end at 1, and the first layer holds all tokens. Falls are joined into at most
`max_points` points, falls below a tenth first, with the same mean over layers. The defaults of alpha and beta are ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from foveate.configs.errors import ConfigError
from foveate.engine.prune.base import Kept, Pruner, best
from foveate.engine.prune.probe import Probe
from foveate.engine.prune.schedule import Point, of_table


@dataclass(frozen=True, kw_only=True)
class PSigmoid(Pruner):
    """Ranks by the last token's attention in the layer before each point."""

    source: ClassVar[str] = "arXiv:2412.00556"

    alpha: float = 10.0  # how steeply shares fall; 0: all layers but the first hold the same share
    beta: float = 0.4  # where the shares fall, as a share of the depth
    mean: float = 0.5  # mean over layers of the share of the entering visual tokens
    max_points: int = 4  # largest number of layers at which tokens are dropped

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 100.0:
            raise ConfigError(f"alpha: {self.alpha} is not in [0, 100]")
        if not 0.0 <= self.beta <= 1.0:
            raise ConfigError(f"beta: {self.beta} is not in [0, 1]")
        if not 0.0 < self.mean <= 1.0:
            raise ConfigError(f"mean: {self.mean} is not in (0, 1]")
        if self.max_points < 1:
            raise ConfigError(f"max_points: {self.max_points} is not at least 1")

    def points(self, n_layers: int) -> tuple[Point, ...]:
        if self.mean < 1 / n_layers - 1e-9:
            raise ConfigError(f"mean: {self.mean} is below what the first of {n_layers} layers holds alone; raise it")
        return of_table(self.table(n_layers), self.max_points, exact_mean=True)

    def table(self, n_layers: int) -> list[float]:
        """The share of each layer before falls are joined; the mean over layers is `mean`."""
        slope = [-math.log1p(math.exp(self.alpha * (i / n_layers - self.beta))) for i in range(1, n_layers)]
        low, high = -800.0, 200.0  # the logarithm of the factor

        def at(factor: float) -> list[float]:
            return [1.0, *(math.exp(min(0.0, factor + log)) for log in slope)]

        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(at(middle)) < self.mean * n_layers else (low, middle)
        return at(high)

    def select(self, probe: Probe, counts: Sequence[int]) -> Kept:
        return Kept(best(probe, probe.attention(probe.last)[0], counts))


METHOD = PSigmoid
