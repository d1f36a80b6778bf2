"""FastV: after a few layers, drop the visual tokens that the prompt's last token attends to least.

Source: Chen et al., 2024, arXiv:2403.06764 (released code: pkunlp-icler/FastV).
The attention is that of the layer before, which is paid anyway, a mean over heads. Positions stay.
Departs from it: the count is of each picture, not of all together; k = 0, random tokens there, is `horizon`; in a
decoder of two layers the default k is 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from foveate.configs.errors import ConfigError
from foveate.engine.prune.base import Kept, Pruner, best
from foveate.engine.prune.probe import Probe
from foveate.engine.prune.schedule import Point, at_depth, staged


@dataclass(frozen=True, kw_only=True)
class FastV(Pruner):
    """One stage, one row of attention. Kept sets are nested: a smaller count keeps a subset."""

    source: ClassVar[str] = "arXiv:2403.06764"
    paper: ClassVar[tuple[int, int]] = (2, 32)  # layers that see all tokens, and how many there are

    k: int = 0  # layers that see all tokens; 0: the paper's, scaled to the depth
    r: float = 0.5  # share that leaves after them

    def __post_init__(self) -> None:
        if self.k < 0:
            raise ConfigError(f"k: {self.k} is not at least 1, or 0 for the paper's")
        if not 0.0 <= self.r <= 1.0:
            raise ConfigError(f"r: {self.r} is not in [0, 1]; it is the share that leaves")

    def points(self, n_layers: int) -> tuple[Point, ...]:
        return staged([self.k or at_depth(*self.paper, n_layers)], [1 - self.r], n_layers)

    def select(self, probe: Probe, counts: Sequence[int]) -> Kept:
        return Kept(best(probe, probe.attention(probe.last)[0], counts))


METHOD = FastV
