"""CATP, stage 2: keep the tokens of in-context pictures that the question and the question's own picture attend to.

Source: Li et al., 2025, arXiv:2508.07871 (a summary; no code seen), its stage inside the language model. The stage
before the language model is the reducer `catp`; `catp+catp2` is both.
The question is about the last picture. The attention of the prompt's last token ranks the tokens of the last picture.
Two kinds of attention, half and half, rank the tokens of the pictures before it: the attention of the words after all
pictures, and the attention of the last picture's tokens. Attention is that of the layer before, as a mean over heads.
Departs from the paper: layers, the half and half and the first share are ours; the last share is the paper's 22.2 %.
Each picture keeps its share, so no picture is lost. With one picture, the method is FastV in stages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.configs.errors import ConfigError
from foveate.engine.prune.base import Kept, Staged, best
from foveate.engine.prune.probe import Probe


@dataclass(frozen=True, kw_only=True)
class CATP2(Staged):
    """Costs one row of attention per word and, with several pictures, per token of the last picture."""

    source: ClassVar[str] = "arXiv:2508.07871"
    paper: ClassVar[tuple[int, ...]] = (2, 4)
    depth: ClassVar[int] = 32

    shares: str = "0.5,0.222"
    alpha: float = 0.5  # weight of the words; the last picture weighs the rest

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.alpha <= 1.0:
            raise ConfigError(f"alpha: {self.alpha} is not in [0, 1]")

    def select(self, probe: Probe, counts: Sequence[int]) -> Kept:
        asked = probe.picture == len(counts) - 1
        scores = probe.attention(probe.last)[0]
        if not bool(asked.all()):
            shown = probe.received(probe.visual[asked])
            scores = torch.where(asked, scores, self.alpha * probe.received(probe.question) + (1 - self.alpha) * shown)
        return Kept(best(probe, scores, counts))


METHOD = CATP2
