"""MustDrop, stage 2: in stages, drop visual tokens that the words of the question do not look at, alone or together.

Source: Liu et al., 2024, arXiv:2411.10803 (released code: liuting20/MustDrop), its stage in the prefill; the one at the
encoder is the reducer `mustdrop`, so both is `mustdrop+mustdrop2`.
A token is let go if the words together pay it less than `theta_sum` of what they pay to all visual tokens, and no
single word pays it `theta_max` of its attention. Attention is that of the layer before, a mean over heads.
Departs from it: the count is fixed beforehand. Tokens are ranked by how far they are above the threshold that is
kinder to them, as a ratio: if more pass than may stay, the nearest to the thresholds go, and if fewer, the nearest
below stay. So only the ratio of the two thresholds matters. The shares are ours, to the paper's 192 of 576 tokens on
average. The encoder's protected tokens are not known here, and the keys and values of layers already run stay, where
the paper thins them out afterwards. Positions stay, where the released code numbers survivors anew (`compact` does).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.configs.errors import ConfigError
from foveate.engine.prune.base import Kept, Staged, best
from foveate.engine.prune.probe import Probe


@dataclass(frozen=True, kw_only=True)
class MustDrop2(Staged):
    """Costs a row of attention per word and stage."""

    source: ClassVar[str] = "arXiv:2411.10803"
    paper: ClassVar[tuple[int, ...]] = (3, 7, 11, 15)  # after layers 2, 6, 10 and 14
    depth: ClassVar[int] = 32

    shares: str = "0.6,0.4,0.2,0.17"
    theta_sum: float = 1e-3  # of the words' attention to all visual tokens
    theta_max: float = 1e-3  # of one word's attention

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("theta_sum", "theta_max"):
            if not 1e-9 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name}: {getattr(self, name)} is not in [1e-9, 1]")

    def select(self, probe: Probe, counts: Sequence[int]) -> Kept:
        paid = probe.attention(probe.question)  # [Q, V]
        together, alone = paid.sum(0), paid.amax(0)
        share = together / together.sum().clamp(min=1e-20)
        return Kept(best(probe, torch.maximum(share / self.theta_sum, alone / self.theta_max), counts))


METHOD = MustDrop2
