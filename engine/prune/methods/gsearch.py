"""G-Search: keep visual tokens by FastV's ranking; a search has found the fewest that each layer needs.

Source: Zhao et al., 2024, arXiv:2412.00556 (abstract alone read). The ranking hardly changes from layer to layer. So a
greedy search over the layers, by bisection in each layer, finds the counts. `foveate tune` runs the search on a user's
own questions and writes the table for `keep`.
Departs from the paper: the table's falls are joined into at most `max_points` points, and no layer holds less than its
share in the table. Without a table, the shares fall in a straight line from all to almost none, a choice of ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from foveate.configs.errors import ConfigError
from foveate.engine.prune.base import Kept, Pruner, best
from foveate.engine.prune.probe import Probe
from foveate.engine.prune.schedule import Point, numbers, of_table


@dataclass(frozen=True, kw_only=True)
class GSearch(Pruner):
    """Ranks by the last token's attention in the layer before each point."""

    source: ClassVar[str] = "arXiv:2412.00556"

    keep: str = ""  # a share per layer, as in "1,1,0.6,0.3", never growing; empty: a straight line
    max_points: int = 4  # largest number of layers at which tokens are dropped

    def __post_init__(self) -> None:
        table = numbers("keep", self.keep)
        if not all(0 <= share <= 1 for share in table) or any(b > a for a, b in pairwise(table)) or table[:1] not in (
            [], [1.0]
        ):  # fmt: skip
            raise ConfigError(f"keep: {self.keep!r} is not a share per layer that begins with 1 and never grows")
        if self.max_points < 1:
            raise ConfigError(f"max_points: {self.max_points} is not at least 1")

    def points(self, n_layers: int) -> tuple[Point, ...]:
        table = numbers("keep", self.keep) or [1 - layer / n_layers for layer in range(n_layers)]
        if len(table) != n_layers:
            raise ConfigError(f"keep: {len(table)} shares for a decoder of {n_layers} layers; foveate tune writes them")
        return of_table(table, self.max_points, exact_mean=False)

    def select(self, probe: Probe, counts: Sequence[int]) -> Kept:
        return Kept(best(probe, probe.attention(probe.last)[0], counts))


METHOD = GSearch
