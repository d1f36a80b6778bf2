"""PosPad: keep the most attended tokens, and put the mean of every run of dropped tokens at the end of the run.

Source: Ouyang et al., 2026, arXiv:2601.03928 (FocusUI; released code: showlab/FocusUI).
The method drops tokens in runs of reading order. One row stands for each run, at the end of the run. So positions do
not jump, and a trace of the dropped tokens stays.
Departs from the paper: FocusUI's scores come from a trained scorer, and its marker of a run is a learned row. Without
training, the scores are the encoder's attention (attention received without a CLS row), and the marker is the mean of
its run. The budget counts markers too: tokens are kept from the best down while their runs fit. If room for one row is
left and splitting a run would exceed it, the best token at the end of a run takes the room. Ties go to the lower index,
not to a draw.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch

from foveate.engine.common import ENC, Signal, Tower, signals
from foveate.engine.primitives.ranking import saliency
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import TokenTransform, VisualInputs


@dataclass(frozen=True, kw_only=True)
class PosPad(Reducer):
    """Every source token is in exactly one output row."""

    source: ClassVar[str] = "arXiv:2601.03928"
    group: ClassVar[Group] = "select and merge"

    layer: int = -1  # the layer whose attention ranks the tokens

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({signals.saliency(self.layer), ENC})

    def transform(self, inputs: VisualInputs, k: int) -> TokenTransform:
        order = torch.sort(saliency(inputs, self.layer), descending=True, stable=True).indices
        kept = keep_with_runs(order.tolist(), k)
        starts = [i == 0 or kept[i] or kept[i - 1] for i in range(inputs.n)]  # whether a token starts an output row
        owner = torch.tensor([number - 1 for number in accumulate(starts)])
        last = torch.searchsorted(owner, torch.arange(k), right=True) - 1
        return TokenTransform.merging(owner, last, space=inputs.space)


METHOD = PosPad


def keep_with_runs(order: list[int], k: int) -> list[bool]:
    """Whether each token is kept, such that the kept tokens and the runs between them make k rows.

    One more kept token splits a run in two (+2 rows), shortens a run (+1), or replaces a run of one token (+0).
    """
    n = len(order)
    kept = [False] * n
    total = 1  # all tokens are one run

    def added(i: int) -> int:
        return (i > 0 and not kept[i - 1]) + (i < n - 1 and not kept[i + 1])

    for _ in range(2):  # the second round is for a token now at the end of a run, skipped inside it
        for i in order:
            if not kept[i] and 0 < added(i) <= k - total:
                total += added(i)
                kept[i] = True
    assert total == k, "a run of two or more can always be shortened by one"
    return kept
