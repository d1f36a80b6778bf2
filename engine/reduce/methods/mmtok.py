"""MMTok: keep the tokens that together cover both the words of the question and all the other tokens.

Source: Dong et al., 2025, arXiv:2508.18264 (released code: Ironieser/MMTok).
Each word spreads its weight over the tokens by a sharp softmax of cosines, and so does, less sharply, each token; what
a kept set covers is the sum over words and tokens of the largest weight that they give to any of it, and greedy choice
comes within 1 - 1/e of the best.
Departs from it: the words are those of the whole question, where the released code cleans LLaVA's and lets a small
model add to them; and tokens are compared as the last layer of the tower leaves them, the mean of a token's patches in
towers that merge them. Without a question only tokens are to be covered.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.primitives.greedy import coverage
from foveate.engine.primitives.ranking import unit
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import signals
from foveate.engine.vision.inputs import VisualInputs
from foveate.engine.vision.signals import QUESTION, Signal, Tower


@dataclass(frozen=True, kw_only=True)
class MMTok(Reducer):
    """Needs no attention weights. Kept sets are nested: a smaller budget keeps a subset."""

    source: ClassVar[str] = "arXiv:2508.18264"
    group: ClassVar[Group] = "by unlikeness or coverage"
    question_aware: ClassVar[bool] = True

    alpha: float = 0.5  # weight of all tokens together beside all words together; 0: words alone
    text_temperature: float = 0.02
    vision_temperature: float = 0.2

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 100.0:
            raise ConfigError(f"alpha: {self.alpha} is not in [0, 100]")
        for name in ("text_temperature", "vision_temperature"):
            if not 0.001 <= getattr(self, name) <= 100.0:
                raise ConfigError(f"{name}: {getattr(self, name)} is not in [0.001, 100]")

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({QUESTION, signals.hidden()})

    def select(self, inputs: VisualInputs, k: int) -> Tensor:
        return coverage(self.worth(inputs), k).sort().values

    def worth(self, inputs: VisualInputs) -> Tensor:
        """[words + n, n] float32: how well each token covers each word, and each token."""
        assert inputs.question is not None, "a question-aware method asks for the question"
        seen = unit(inputs.hidden())
        words = unit(inputs.question) @ unit(inputs.proj).T
        of_words = (words / self.text_temperature).softmax(1) / max(len(words), 1)
        of_tokens = (seen @ seen.T / self.vision_temperature).softmax(1) * (self.alpha / inputs.n)
        return torch.cat([of_words, of_tokens])


METHOD = MMTok
