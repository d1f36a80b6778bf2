"""VisionDrop: keep the visual tokens that the others attend to most, and merge the rest into a few contextual tokens.

Source: Xu et al., 2025, arXiv:2506.22283 (released code: Ruixxxx/VisionDrop), its stage at the encoder.
Attention received from the visual tokens ranks the tokens; the method reads no text. A share of the k tokens is
contextual, by default the 6 of 48 of the paper's smallest setting. Their targets are spread evenly over the tokens that
are not dominant. Every other token joins the target with the nearest attention key by cosine.
Departs from the paper: the stages inside the language model are the method `visiondrop2`, so one count stands for the
paper's 48, 35, 26 and 19. A CLS row that attends counts as one query among all. A contextual row is the plain mean of
target and members. The released code ranks by the CLS row's attention and adds the mean of the members to the target,
of weight 2 (`compat` restores both). Contextual rows stand where their targets stood.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.configs.errors import ConfigError
from foveate.engine.common import ENC, Signal, Tower, signals
from foveate.engine.primitives.merge import nearest, select_and_merge
from foveate.engine.primitives.ranking import complement, finite, top
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import TokenTransform, VisualInputs


@dataclass(frozen=True, kw_only=True)
class VisionDrop(Reducer):
    """Every source token is in exactly one output row."""

    source: ClassVar[str] = "arXiv:2506.22283"
    group: ClassVar[Group] = "select and merge"

    contextual_ratio: float = 6 / 48  # share of contextual tokens, rounded; 0: selection only
    compat: bool = False  # CLS attention ranks, and contextual row = target + mean of its members, as released

    def __post_init__(self) -> None:
        if not 0.0 <= self.contextual_ratio < 1.0:
            raise ConfigError(f"contextual_ratio: {self.contextual_ratio} is not in [0, 1)")

    def needs(self, tower: Tower) -> frozenset[Signal]:
        attention = signals.saliency() if self.compat else signals.recv()
        return frozenset({attention, signals.keys(), ENC})

    def transform(self, inputs: VisualInputs, k: int) -> TokenTransform:
        n_contextual = min(round(k * self.contextual_ratio), k - 1)
        attention = finite("attention weights", inputs.saliency() if self.compat else inputs.recv())
        dominant = top(attention, k - n_contextual).cpu()
        if n_contextual == 0:
            return TokenTransform.selection(dominant, inputs.n)
        left = complement(dominant, inputs.n)
        targets = left[:: len(left) // n_contextual][:n_contextual]
        keys = inputs.keys()
        into = nearest(keys, targets.to(keys.device)).cpu()
        weights = None
        if self.compat:
            n_members = torch.bincount(into[left], minlength=inputs.n) - 1  # the target counts itself
            weights = (1.0 / n_members.clamp(min=1))[into].index_fill(0, targets, 1.0)
        return select_and_merge(dominant, targets, into, weights, inputs.space)


METHOD = VisionDrop
