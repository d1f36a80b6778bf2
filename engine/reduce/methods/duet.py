"""DUET-VLM: keep the tokens the encoder attends to most and small clusters of the next best; drop the others.

Source: Singh et al., 2026, arXiv:2602.18846 (released code: AMD-AGI/DUET-VLM), its stage at the encoder.
Of k tokens a share is contextual, by default the released 35 of 205. Only the best `cluster_width` times as many of the
tokens that are not dominant are looked at: every so many of them, from the best on, is an anchor, and the others join
the anchor whose attention key is nearest by cosine. What is below that is dropped.
Departs from it: a contextual row is the plain mean of anchor and members, so its norm is that of a visual token;
`compat` restores the released anchor + mean of members, of weight 2. The stage inside the language model is not part of
it. Rows are mixed before the projector where the encoder gives such rows; without a CLS row, attention received ranks.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.configs.errors import ConfigError
from foveate.engine.primitives.merge import nearest, select_and_merge
from foveate.engine.primitives.ranking import saliency
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import signals
from foveate.engine.vision.inputs import VisualInputs
from foveate.engine.vision.signals import ENC, Signal, Tower
from foveate.engine.vision.transform import TokenTransform


@dataclass(frozen=True, kw_only=True)
class Duet(Reducer):
    """A source token is in one output row or, if it is little attended to, in none."""

    source: ClassVar[str] = "arXiv:2602.18846"
    group: ClassVar[Group] = "select and merge"

    contextual_ratio: float = 35 / 205  # share of contextual tokens, to the nearest token; 0: selection only
    cluster_width: int = 4  # tokens looked at for each contextual one, itself among them
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
            n_members = torch.bincount(into[pool], minlength=inputs.n) - 1  # the anchor is in its own
            weights = (1.0 / n_members.clamp(min=1))[into.clamp(min=0)].index_fill(0, anchors, 1.0)
        return select_and_merge(dominant, anchors, into, weights, inputs.space)


METHOD = Duet
