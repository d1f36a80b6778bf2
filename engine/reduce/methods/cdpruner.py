"""CDPruner: keep tokens that differ from each other and relate to the question, by a determinantal point process.

Source: Zhang et al., 2025, arXiv:2506.10967 (released code: Theia-4869/CDPruner).
Relevance is the mean cosine of a token with the words of the question, scaled to 0..1. The kernel is relevance_i *
cos(i, j) * relevance_j. A greedy search maximises the determinant of the kernel over the kept tokens.
Departs from the paper: relevance is measured in the language model's own space, for every encoder. On LLaVA the paper
uses the text half of CLIP, which is not part of the model; on Qwen-VL the paper does the same as this method. So the
sign is the plain one. On CLIP the released code takes the least similar tokens as the most relevant (`compat` restores
that sign). Without a question, all tokens are equally relevant, and diversity alone decides. Once the kept tokens span
the features, the most relevant tokens follow.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import QUESTION, Signal, Tower
from foveate.engine.primitives.greedy import determinantal
from foveate.engine.primitives.ranking import norm01, unit
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import VisualInputs


@dataclass(frozen=True, kw_only=True)
class CDPruner(Reducer):
    """Needs no attention weights. Kept sets are nested: a smaller budget keeps a subset."""

    source: ClassVar[str] = "arXiv:2506.10967"
    group: ClassVar[Group] = "by unlikeness or coverage"
    question_aware: ClassVar[bool] = True

    weight: float = 1.0  # exponent of the relevance; 0: diversity alone
    compat: bool = False  # the least similar tokens are the most relevant, as released for CLIP

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight <= 10.0:
            raise ConfigError(f"weight: {self.weight} is not in [0, 10]")

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({QUESTION})

    def select(self, inputs: VisualInputs, k: int) -> Tensor:
        """Cost: n^2 * D multiply-adds once, then k passes over k * n numbers; n^2 floats of memory."""
        rows = unit(inputs.proj)
        quality = self.relevance(inputs, rows) ** self.weight
        similarity = rows @ rows.T
        similarity.fill_diagonal_(1.0)
        return determinantal(similarity, quality, k).sort().values

    def relevance(self, inputs: VisualInputs, rows: Tensor) -> Tensor:
        """[n] float32 in 0..1."""
        assert inputs.question is not None, "a question-aware method asks for the question"
        if not len(inputs.question):
            return torch.ones(inputs.n, device=rows.device)
        cosine = (rows @ unit(inputs.question).T).mean(1)
        return norm01(-cosine if self.compat else cosine)


METHOD = CDPruner
