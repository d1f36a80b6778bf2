"""CATP: keep tokens that stand for the whole picture and are close to the text beside it; for examples in the context.

Source: Li et al., 2025, arXiv:2508.07871 (contextually adaptive token pruning for multimodal in-context learning), its
first stage. Of each picture the tokens are kept that maximise, greedily, the sum over all its tokens of their
similarity to the nearest kept one plus 0.7 times the similarity of each kept one to the mean of the text that goes
with the picture; similarities are (cosine + 1) / 2.
Departs from it: the count is the budget's, whatever share the paper takes in this stage. The text of a picture is what
follows it in its message. The second stage ranks the tokens of all pictures together inside the language model and is
not part of it.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.primitives.greedy import coverage
from foveate.engine.primitives.ranking import unit
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision.inputs import VisualInputs
from foveate.engine.vision.signals import CAPTION, Signal, Tower


@dataclass(frozen=True, kw_only=True)
class CATP(Reducer):
    """Needs no attention weights. Kept sets are nested: a smaller budget keeps a subset."""

    source: ClassVar[str] = "arXiv:2508.07871"
    group: ClassVar[Group] = "by unlikeness or coverage"
    question_aware: ClassVar[bool] = True

    weight: float = 0.7  # of the text; 0: what stands for the picture alone

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight <= 100.0:
            raise ConfigError(f"weight: {self.weight} is not in [0, 100]")

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({CAPTION})

    def select(self, inputs: VisualInputs, k: int) -> Tensor:
        assert inputs.caption is not None, "a method that reads the caption asks for it"
        rows = unit(inputs.proj)
        likeness = ((rows @ rows.T + 1) / 2).clamp(min=0)
        bonus = likeness.new_zeros(inputs.n)
        if len(inputs.caption):
            text = unit(inputs.caption.float().mean(0, keepdim=True))
            bonus = self.weight * ((rows @ text.T)[:, 0] + 1) / 2
        return coverage(likeness, k, bonus).sort().values


METHOD = CATP
