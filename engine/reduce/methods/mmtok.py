"""MMTok: keep the tokens that together cover the words of the question and all the other tokens best.

Source: Dong et al., 2025, arXiv:2508.18264 (released code: Ironieser/MMTok).
Each word spreads its weight over the tokens by a sharp softmax of cosines. Each token does the same by a less sharp
softmax. The coverage of a kept set is the sum, over words and tokens, of the largest weight that they give to a kept
token. The greedy choice comes within 1 - 1/e of the best coverage.
Departs from the paper: the words are those of the whole question; the released code cleans LLaVA's question and lets a
small model add words. Tokens are compared as the last layer of the tower leaves them, by the mean of their patches in
towers that merge patches. Without a question, the kept tokens cover tokens only.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import QUESTION, Signal, Tower, signals
from foveate.engine.primitives.greedy import coverage
from foveate.engine.primitives.ranking import unit
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import VisualInputs


@dataclass(frozen=True, kw_only=True)
class MMTok(Reducer):
    """Needs no attention weights. Kept sets are nested: a smaller budget keeps a subset."""

    source: ClassVar[str] = "arXiv:2508.18264"
    group: ClassVar[Group] = "by unlikeness or coverage"
    question_aware: ClassVar[bool] = True

    alpha: float = 0.5  # weight of all tokens together; all words together weigh 1; 0: words alone
    text_temperature: float = 0.02  # temperature of a word's softmax over the tokens
    vision_temperature: float = 0.2  # temperature of a token's softmax over the tokens

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
        """[words + n, n] float32: how well each token (column) covers each word and each token (row)."""
        assert inputs.question is not None, "a question-aware method asks for the question"
        seen = unit(inputs.hidden())
        words = unit(inputs.question) @ unit(inputs.proj).T
        of_words = (words / self.text_temperature).softmax(1) / max(len(words), 1)
        of_tokens = (seen @ seen.T / self.vision_temperature).softmax(1) * (self.alpha / inputs.n)
        return torch.cat([of_words, of_tokens])


METHOD = MMTok
