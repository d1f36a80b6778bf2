"""Information Horizon: drop visual tokens at random in the deep half of the decoder; the baseline of the family.

Source: Wang et al., 2025, arXiv:2512.07580 (abstract alone read): from some layer on, it does not matter which visual
tokens are left. From a later layer, the horizon, it does not matter whether any token is left.
The draw is a function of the pictures, the layer and `seed`. Each stage draws from the tokens that the stage before
left. A smaller count keeps a subset.
Departs from the paper: layers and shares are ours: PyramidDrop's shares in the deep half of a 28-layer decoder. `exit`
is off, because the horizon depends on the model and is deeper for text in pictures (about layer 20 in Qwen2.5-VL's 28).
The paper reduces by DivPrune before the decoder; here DivPrune is a reducer of its own: `divprune+horizon`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.configs.errors import ConfigError
from foveate.engine.prune.base import Kept, Staged, best
from foveate.engine.prune.probe import Probe
from foveate.engine.prune.schedule import Point


@dataclass(frozen=True, kw_only=True)
class Horizon(Staged):
    """Reads nothing of the prompt, so the kept sets are known before prefill."""

    source: ClassVar[str] = "arXiv:2512.07580"
    question_aware: ClassVar[bool] = False
    paper: ClassVar[tuple[int, ...]] = (14, 17, 20)
    depth: ClassVar[int] = 28

    shares: str = "0.5,0.25,0.125"
    exit: float = 1.0  # share of the depth from which on no visual token stays; 1: off
    seed: int = 0  # another seed is another draw for the same pictures

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.exit <= 1.0:
            raise ConfigError(f"exit: {self.exit} is not in (0, 1]")

    def points(self, n_layers: int) -> tuple[Point, ...]:
        out = max(1, round(self.exit * n_layers))
        points = tuple(point for point in super().points(n_layers) if point.layer < out)
        return points if out >= n_layers else (*points, Point(out, 0.0))

    def select(self, probe: Probe, counts: Sequence[int]) -> Kept:
        luck = torch.empty(len(probe.visual))
        for picture in range(len(counts)):
            mine = (probe.picture == picture).cpu()
            # Hashed, not added: layer 1 with seed 2 and layer 2 with seed 1 are different draws.
            digest = hashlib.sha256(f"{probe.seed}/{self.seed}/{probe.layer}/{picture}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            luck[mine] = torch.randperm(int(mine.sum()), generator=generator).float()
        return Kept(best(probe, luck.to(probe.rows.device), counts))


METHOD = Horizon
