"""ToDRE: keep one token after the other, each with the least summed similarity to the tokens kept before.

Source: Li et al., 2025, arXiv:2505.18757 (stage 1; the authors have released no code).
The method starts from one token. The next token is the one whose cosines with the kept tokens have the smallest sum
(the revised paper), or the one whose nearest kept token is farthest (`mode=k_center`, the first version).
Departs from the paper: this is only the stage between encoder and language model. The second stage, which drops all
visual tokens at a decoder layer, is the method `todre2`. The first token is the one least like the others on average, a
choice of ours; `start=attended` begins with the token that the encoder attends to most. Kept tokens keep their
positions in the prompt.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from foveate.engine.common import Signal, Tower, signals
from foveate.engine.primitives.greedy import farthest, greedy
from foveate.engine.primitives.ranking import saliency, unit
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import VisualInputs


@dataclass(frozen=True, kw_only=True)
class ToDRE(Reducer):
    """Needs no text, and no attention weights by default. Kept sets are nested: a smaller budget keeps a subset."""

    source: ClassVar[str] = "arXiv:2505.18757"
    group: ClassVar[Group] = "by unlikeness or coverage"

    mode: Literal["max_sum", "k_center"] = "max_sum"  # the next token: least sum of cosines, or least largest cosine
    start: Literal["unlike", "attended"] = "unlike"  # the first token: least like the others, or most attended

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({signals.saliency()}) if self.start == "attended" else frozenset()

    def select(self, inputs: VisualInputs, k: int) -> Tensor:
        """Cost: n^2 * D multiply-adds once, then k passes over n numbers; n^2 floats of memory."""
        rows = unit(inputs.proj)
        similarity = rows @ rows.T
        if self.start == "attended":
            first = saliency(inputs).argmax(0, keepdim=True)
        else:
            first = (similarity.diagonal() - similarity.sum(1)).argmax(0, keepdim=True)

        def row(token: Tensor) -> Tensor:
            return similarity.index_select(0, token)[0]

        if self.mode == "k_center":
            rest = farthest(1 - row(first), lambda token: 1 - row(token), first, k - 1)
        else:
            total = row(first)

            def after(pick: Tensor) -> Tensor:
                nonlocal total
                total = total + row(pick)
                return -total

            rest = greedy(-total, after, first, k - 1)
        return torch.cat([first, rest]).sort().values


METHOD = ToDRE
