"""CATP, stage 2: with examples in the context, keep of their pictures what the question and its own picture look at.

Source: Li et al., 2025, arXiv:2508.07871 (a summary; no code seen), its stage inside the language model; the one before
it is the reducer `catp`, so both is `catp+catp2`.
The last picture is the one asked about; its tokens are ranked by the attention of the prompt's last token. Those of the
pictures before it are ranked by the attention of the words after all pictures and of the last picture's tokens, half
and half. Attention is that of the layer before, a mean over heads.
Departs from it: layers, the half and half and the first share are ours; the last share is the paper's 22.2 %. Each
picture keeps its share, so none is lost. With one picture it is FastV in stages.
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
    """Costs a row of attention per word, and with several pictures per token of the last one."""

    source: ClassVar[str] = "arXiv:2508.07871"
    paper: ClassVar[tuple[int, ...]] = (2, 4)
    depth: ClassVar[int] = 32

    shares: str = "0.5,0.222"
    alpha: float = 0.5  # of the words; the rest is the last picture's

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
