"""FastV: after a few layers, drop the visual tokens that the prompt's last token attends to least.

Source: Chen et al., 2024, arXiv:2403.06764 (released code: pkunlp-icler/FastV).
The method reads the attention of the layer before, as a mean over heads; that layer computes it anyway. Positions stay.
Departs from the paper: the count holds for each picture, not for all pictures together. The paper's k = 0, which keeps
random tokens, is the method `horizon`. In a decoder of two layers the default k is 1.
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
    paper: ClassVar[tuple[int, int]] = (2, 32)  # layers that hold all tokens; layers of the decoder

    k: int = 0  # layers that hold all tokens; 0: the paper's, scaled to the depth
    r: float = 0.5  # share of the visual tokens that is dropped after these layers

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
