"""ToDRE, stage 2: drop all visual tokens at a late layer; by then the text has taken over what they say.

Source: Li et al., 2025, arXiv:2505.18757 (the authors have released no code), its stage inside the language model; the
one before it is the reducer `todre`, so both is `todre+todre2`.
Departs from it: the layer is fixed, where the paper watches for the one at which the last token attends to the picture
too little: how many tokens a layer holds must be known before a prompt runs. The default is about where the paper
begins to watch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.configs.errors import ConfigError
from foveate.engine.prune.base import Kept, Pruner, best
from foveate.engine.prune.probe import Probe
from foveate.engine.prune.schedule import Point, at_depth


@dataclass(frozen=True, kw_only=True)
class ToDRE2(Pruner):
    """Ranks nothing."""

    source: ClassVar[str] = "arXiv:2505.18757"
    question_aware: ClassVar[bool] = False

    at: float = 0.6  # share of the depth from which on there are no visual tokens

    def __post_init__(self) -> None:
        if not 0.0 < self.at < 1.0:
            raise ConfigError(f"at: {self.at} is not in (0, 1)")

    def points(self, n_layers: int) -> tuple[Point, ...]:
        return (Point(at_depth(round(self.at * n_layers), n_layers, n_layers), 0.0),)

    def select(self, probe: Probe, counts: Sequence[int]) -> Kept:
        return Kept(best(probe, torch.zeros(len(probe.visual), device=probe.rows.device), counts))


METHOD = ToDRE2
