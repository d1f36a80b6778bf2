"""AdaToken-3D: in stages, keep visual tokens by PyramidDrop's ranking, on a schedule fitted to information flow.

Source: Zhang et al., 2025, arXiv:2505.12782 (released code), made for LLaVA-3D. The schedule is the released one: ten
falls over a decoder of 32 layers.
Departs from the paper: each point costs one more block table. So falls are joined into at most `max_points` points,
falls below a tenth first, with the same mean over layers; `max_points=10` is the released schedule. The schedule is not
fitted to the model here (`foveate tune` and `gsearch` fit theirs). Positions stay; the released code renumbers the kept
tokens, as `compact` does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from foveate.configs.errors import ConfigError
from foveate.engine.prune.base import Kept, Staged, best
from foveate.engine.prune.probe import Probe
from foveate.engine.prune.schedule import Point, of_table, table_of


@dataclass(frozen=True, kw_only=True)
class AdaToken3D(Staged):
    """Ranks as PyramidDrop does, by the attention of the prompt's last token in the next layer."""

    source: ClassVar[str] = "arXiv:2505.12782"
    paper: ClassVar[tuple[int, ...]] = (4, 8, 12, 16, 18, 20, 22, 24, 26, 28)
    depth: ClassVar[int] = 32

    shares: str = "0.9,0.8,0.75,0.7,0.6,0.55,0.5,0.45,0.4,0.25"
    max_points: int = 4  # largest number of layers at which tokens are dropped

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_points < 1:
            raise ConfigError(f"max_points: {self.max_points} is not at least 1")

    def points(self, n_layers: int) -> tuple[Point, ...]:
        points = super().points(n_layers)
        few = len(points) <= self.max_points
        return points if few else of_table(table_of(points, n_layers), self.max_points, exact_mean=True)

    def select(self, probe: Probe, counts: Sequence[int]) -> Kept:
        return Kept(best(probe, probe.attention(probe.last, "this")[0], counts))


METHOD = AdaToken3D
