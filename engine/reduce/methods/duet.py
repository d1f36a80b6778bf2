"""DUET-VLM: keep the most attended tokens and small clusters of the next best tokens; drop the other tokens.

Source: Singh et al., 2026, arXiv:2602.18846 (released code: AMD-AGI/DUET-VLM), its stage at the encoder.
A share of the k tokens is contextual, by default the released 35 of 205. The others are dominant: the most attended
tokens. Of the tokens that are not dominant, the best form a pool: `cluster_width` tokens for each contextual token.
Evenly spaced tokens of the pool, from the best on, are anchors. Each other token of the pool joins the anchor with the
nearest attention key by cosine. Tokens outside the pool are dropped.
Departs from the paper: a contextual row is the plain mean of anchor and members, so its norm is that of a visual token.
`compat` restores the released anchor + mean of members, of weight 2. The stage inside the language model is the method
`duet2`. Rows are mixed before the projector if the encoder gives rows before the projector. Without a CLS row,
attention received ranks the tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.configs.errors import ConfigError
from foveate.engine.common import ENC, Signal, Tower, signals
from foveate.engine.primitives.merge import nearest, select_and_merge
from foveate.engine.primitives.ranking import saliency
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import TokenTransform, VisualInputs


@dataclass(frozen=True, kw_only=True)
class Duet(Reducer):
    """A source token is in one output row or, outside the pool, in none."""

    source: ClassVar[str] = "arXiv:2602.18846"
    group: ClassVar[Group] = "select and merge"

    contextual_ratio: float = 35 / 205  # share of contextual tokens, rounded; 0: selection only
    cluster_width: int = 4  # tokens of the pool for each contextual token, the anchor included
    compat: bool = False  # contextual row = anchor + mean of its members, as released

    def __post_init__(self) -> None:
        if not 0.0 <= self.contextual_ratio < 1.0:
            raise ConfigError(f"contextual_ratio: {self.contextual_ratio} is not in [0, 1)")
        if self.cluster_width < 1:
            raise ConfigError(f"cluster_width: {self.cluster_width} is not at least 1")

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({signals.saliency(), signals.keys(), ENC})

    def transform(self, inputs: VisualInputs, k: int) -> TokenTransform:
        n_contextual = min(round(k * self.contextual_ratio), k - 1)
        best = torch.sort(saliency(inputs), descending=True, stable=True).indices.cpu()
        dominant, others = best[: k - n_contextual].sort().values, best[k - n_contextual :]
        if n_contextual == 0:
            return TokenTransform.selection(dominant, inputs.n)
        pool = others[: self.cluster_width * n_contextual]
        anchors = pool[:: len(pool) // n_contextual][:n_contextual].sort().values
        keys = inputs.keys()
        into = torch.full((inputs.n,), -1)
        into[pool] = nearest(keys, anchors.to(keys.device)).cpu()[pool]
        weights = None
        if self.compat:
            n_members = torch.bincount(into[pool], minlength=inputs.n) - 1  # the anchor counts itself
            weights = (1.0 / n_members.clamp(min=1))[into.clamp(min=0)].index_fill(0, anchors, 1.0)
        return select_and_merge(dominant, anchors, into, weights, inputs.space)


METHOD = Duet
