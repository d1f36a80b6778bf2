"""VisionDrop, in the decoder: in stages, keep visual tokens that the others attend to, and merge the rest into a few.

Source: Xu et al., 2025, arXiv:2506.22283 (released code: Ruixxxx/VisionDrop), its stages inside the language model. The
stage at the encoder is the reducer `visiondrop`; `visiondrop+visiondrop2` is both.
Attention received from visual tokens in the next layer ranks the tokens; the method reads no text. A share of the
tokens that stay is contextual: about the paper's 5 of 35, 4 of 26 and 3 of 19 after 48 at the encoder. Their targets
are spread evenly over the tokens that are not dominant. Every other token joins the target with the nearest key by
cosine; a key is a mean over heads.
Departs from the paper: a picture is ranked by its own tokens, so text after the picture changes nothing. A contextual
row is the plain mean of target and members and stands where the target stood. `compat` restores the released target +
mean of members, of weight 2. Positions stay; the released code renumbers the kept tokens, as `compact` does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.primitives.ranking import complement, top
from foveate.engine.prune.base import Kept, Staged, as_they_are
from foveate.engine.prune.probe import Probe


@dataclass(frozen=True, kw_only=True)
class VisionDrop2(Staged):
    """Every token is in exactly one row that stays, if its picture keeps at least two rows."""

    source: ClassVar[str] = "arXiv:2506.22283"
    question_aware: ClassVar[bool] = False
    paper: ClassVar[tuple[int, ...]] = (8, 16, 24)
    depth: ClassVar[int] = 32

    shares: str = "0.73,0.542,0.396"  # share of the entering visual tokens that stay at each layer; 35, 26 and 19 of 48
    contextual_ratio: float = 1 / 7  # share of contextual tokens, rounded; 0: selection only
    compat: bool = False  # contextual row = target + mean of its members, as released

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.contextual_ratio < 1.0:
            raise ConfigError(f"contextual_ratio: {self.contextual_ratio} is not in [0, 1)")

    def select(self, probe: Probe, counts: Sequence[int]) -> Kept:
        keys = torch.nn.functional.normalize(probe.keys("this"), dim=-1)
        mix = torch.zeros(0, len(probe.visual), device=keys.device)
        kept = [torch.empty(0, dtype=torch.int64, device=keys.device)]
        for picture, count in enumerate(counts):
            mine = (probe.picture == picture).nonzero()[:, 0]
            if count:
                scores = probe.received(probe.visual[mine], "this")[mine]
                keep, weights = self._one(scores, keys[mine], count)
                kept.append(mine[keep])
                mix = torch.cat([mix, torch.zeros(count, mix.shape[1], device=keys.device)])
                mix[-count:, mine] = weights
        return Kept(torch.cat(kept), mix)

    def _one(self, scores: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The tokens that stay of one picture's n, [count], and the mix, [count, n]."""
        n = len(scores)
        n_contextual = min(round(count * self.contextual_ratio), count - 1) if count < n else 0
        dominant = top(scores, count - n_contextual)
        if not n_contextual:
            return dominant, as_they_are(dominant, n)
        left = complement(dominant, n)
        targets = left[:: len(left) // n_contextual][:n_contextual]
        into = targets[(keys @ keys[targets].T).argmax(1)]
        into[targets] = targets  # even if a lower index has an identical key
        into[dominant] = dominant
        keep = torch.cat([dominant, targets]).sort().values
        member = (into[None] == keep[:, None]).float()
        size = member.sum(1, keepdim=True)
        if not self.compat:
            return keep, member / size
        own = as_they_are(keep, n)
        return keep, own + (member - own) / (size - 1).clamp(min=1)


METHOD = VisionDrop2
