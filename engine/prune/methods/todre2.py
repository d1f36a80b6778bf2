"""ToDRE, stage 2: drop all visual tokens at a late layer; by then the text tokens hold their information.

Source: Li et al., 2025, arXiv:2505.18757 (the authors have released no code), its stage inside the language model. The
stage before the language model is the reducer `todre`; `todre+todre2` is both.
Departs from the paper: the layer is fixed. The paper watches for the layer at which the last token attends to the
picture too little, but the number of tokens that a layer holds must be known before a prompt runs. The default is about
where the paper begins to watch.
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
    """Needs no ranking."""

    source: ClassVar[str] = "arXiv:2505.18757"
    question_aware: ClassVar[bool] = False

    at: float = 0.6  # share of the depth from which on no visual token stays

    def __post_init__(self) -> None:
        if not 0.0 < self.at < 1.0:
            raise ConfigError(f"at: {self.at} is not in (0, 1)")

    def points(self, n_layers: int) -> tuple[Point, ...]:
        return (Point(at_depth(round(self.at * n_layers), n_layers, n_layers), 0.0),)

    def select(self, probe: Probe, counts: Sequence[int]) -> Kept:
        return Kept(best(probe, torch.zeros(len(probe.visual), device=probe.rows.device), counts))


METHOD = ToDRE2
