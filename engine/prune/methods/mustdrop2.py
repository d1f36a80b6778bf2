"""MustDrop, stage 2: in stages, drop visual tokens that the words of the question attend to neither alone nor together.

Source: Liu et al., 2024, arXiv:2411.10803 (released code: liuting20/MustDrop), its stage in the prefill. The stage at
the encoder is the reducer `mustdrop`; `mustdrop+mustdrop2` is both.
The paper drops a token under two conditions: the words together pay the token less than `theta_sum` of their attention
to all visual tokens, and no single word pays the token `theta_max` of its attention. Attention is that of the layer
before, as a mean over heads.
Departs from the paper: the count is fixed beforehand. Tokens are ranked by their ratio to the threshold that is kinder
to them. If more tokens pass than may stay, the tokens nearest to the thresholds are dropped; if fewer pass, the nearest
tokens below stay. So only the ratio of the two thresholds matters. The shares are ours, fitted to the paper's 192 of
576 tokens on average. The encoder's protected tokens are not known here. The keys and values of layers already run
stay; the paper thins them out afterwards. Positions stay; the released code renumbers the kept tokens, as `compact`
does.
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
    """Costs one row of attention per word and stage."""

    source: ClassVar[str] = "arXiv:2411.10803"
    paper: ClassVar[tuple[int, ...]] = (3, 7, 11, 15)  # after layers 2, 6, 10 and 14
    depth: ClassVar[int] = 32

    shares: str = "0.6,0.4,0.2,0.17"
    theta_sum: float = 1e-3  # threshold on a token's share of the words' attention to all visual tokens
    theta_max: float = 1e-3  # threshold on a token's share of one word's attention

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
