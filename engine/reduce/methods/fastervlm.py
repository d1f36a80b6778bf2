"""FasterVLM: keep the tokens that the encoder's CLS row attends to most.

Source: Zhang et al., 2024, arXiv:2412.01818 (released code: Theia-4869/FasterVLM).
Departs from the paper: if the encoder has no CLS row, the method reads attention received (mean over all queries and
heads). Kept tokens keep their positions in the prompt; the paper renumbers them.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.engine.common import Signal, Tower, signals
from foveate.engine.primitives.ranking import saliency, top
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import VisualInputs


@dataclass(frozen=True, kw_only=True)
class FasterVLM(Reducer):
    """Reads one attention row and no features."""

    source: ClassVar[str] = "arXiv:2412.01818"
    group: ClassVar[Group] = "by attention"

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({signals.saliency()})

    def select(self, inputs: VisualInputs, k: int) -> Tensor:
        return top(saliency(inputs), k)


METHOD = FasterVLM
