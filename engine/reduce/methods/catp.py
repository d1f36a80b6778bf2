"""CATP: keep tokens that represent the whole picture and match the text beside the picture; for in-context examples.

Source: Li et al., 2025, arXiv:2508.07871 (contextually adaptive token pruning for multimodal in-context learning), its
first stage.
Of each picture, the method greedily keeps the tokens that maximise a sum of two terms. The first term is the sum, over
all tokens of the picture, of the similarity to the nearest kept token. The second term is 0.7 times the sum, over the
kept tokens, of the similarity to the mean of the text that belongs to the picture. A similarity is (cosine + 1) / 2.
Departs from the paper: the budget sets the count, whatever share the paper keeps in this stage. The text of a picture
is the text after the picture in its message. The second stage, which ranks the tokens of all pictures together inside
the language model, is the method `catp2`.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import CAPTION, Signal, Tower
from foveate.engine.primitives.greedy import coverage
from foveate.engine.primitives.ranking import unit
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import VisualInputs


@dataclass(frozen=True, kw_only=True)
class CATP(Reducer):
    """Needs no attention weights. Kept sets are nested: a smaller budget keeps a subset."""

    source: ClassVar[str] = "arXiv:2508.07871"
    group: ClassVar[Group] = "by unlikeness or coverage"
    question_aware: ClassVar[bool] = True

    weight: float = 0.7  # weight of the text; 0: only how well tokens represent the picture

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
