"""PosPad: keep what the encoder attends to, and put the mean of every run of dropped tokens at the run's end.

Source: Ouyang et al., 2026, arXiv:2601.03928 (FocusUI; released code: showlab/FocusUI).
Tokens are dropped in runs of reading order; one row stands for each run, where it ends, so that positions do not jump
and what was dropped leaves a trace.
Departs from it: FocusUI's scores come from a trained scorer and its marker is a learned row; without training the
scores are the encoder's attention (attention received where it has no CLS row) and the marker is the mean of its run.
The budget counts markers too: tokens are kept from the best down as long as their runs fit, and where one marker's room
is left that splitting a run would exceed, the best token at the end of a run takes it. Ties go to the lower index, not
to a draw.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch

from foveate.engine.primitives.ranking import saliency
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import signals
from foveate.engine.vision.inputs import VisualInputs
from foveate.engine.vision.signals import ENC, Signal, Tower
from foveate.engine.vision.transform import TokenTransform


@dataclass(frozen=True, kw_only=True)
class PosPad(Reducer):
    """Every source token is in exactly one output row."""

    source: ClassVar[str] = "arXiv:2601.03928"
    group: ClassVar[Group] = "select and merge"

    layer: int = -1  # whose attention ranks the tokens

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({signals.saliency(self.layer), ENC})

    def transform(self, inputs: VisualInputs, k: int) -> TokenTransform:
        order = torch.sort(saliency(inputs, self.layer), descending=True, stable=True).indices
        kept = keep_with_runs(order.tolist(), k)
        starts = [i == 0 or kept[i] or kept[i - 1] for i in range(inputs.n)]  # of an output row
        owner = torch.tensor([number - 1 for number in accumulate(starts)])
        last = torch.searchsorted(owner, torch.arange(k), right=True) - 1
        return TokenTransform.merging(owner, last, space=inputs.space)


METHOD = PosPad


def keep_with_runs(order: list[int], k: int) -> list[bool]:
    """Which tokens are kept, so that they and the runs of the others between them are k together.

    Keeping one more splits a run in two (+2), shortens it (+1), or replaces a run of one (0), which changes nothing.
    """
    n = len(order)
    kept = [False] * n
    total = 1  # everything is one run

    def added(i: int) -> int:
        return (i > 0 and not kept[i - 1]) + (i < n - 1 and not kept[i + 1])

    for _ in range(2):  # the second time for a token at the end of a run, passed over when it was inside
        for i in order:
            if not kept[i] and 0 < added(i) <= k - total:
                total += added(i)
                kept[i] = True
    assert total == k, "a run of two or more can always be shortened by one"
    return kept
