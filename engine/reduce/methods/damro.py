"""DAMRO: drop the outliers that draw most of the encoder's attention, and keep the most attended of the other tokens.

Source: Gong et al., 2024, arXiv:2410.04514 (released code: coder-gx/DAMRO).
One softmax over the CLS row's attention of all heads weighs the tokens. The paper takes the tokens of largest weight
for background tokens that store information on the whole picture and mislead the answer.
Departs from the paper: the paper keeps all tokens, decodes a second time with the outliers alone, and subtracts those
logits. Here the outliers are dropped, which is our use of the paper's filter, and the next tokens by the same attention
fill the budget. If too few other tokens are left, the weakest outliers are kept first. The number of outliers is a
share of the tokens: the paper's 10 of LLaVA-1.5's 576, and about the paper's 4 of InstructBLIP's 257. Without a CLS
row, the method reads attention received.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import Signal, Tower, signals
from foveate.engine.primitives.ranking import finite
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import VisualInputs


@dataclass(frozen=True, kw_only=True)
class Damro(Reducer):
    """Reads one attention row and no features."""

    source: ClassVar[str] = "arXiv:2410.04514"
    group: ClassVar[Group] = "by attention"

    outliers: float = 10 / 576  # share of the tokens that are outliers, rounded

    def __post_init__(self) -> None:
        if not 0.0 <= self.outliers < 1.0:
            raise ConfigError(f"outliers: {self.outliers} is not in [0, 1)")

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({signals.cls_cat() if tower.has_cls else signals.recv()})

    def select(self, inputs: VisualInputs, k: int) -> Tensor:
        attention = finite("attention weights", inputs.cls_cat() if inputs.tower.has_cls else inputs.recv())
        n_outliers = min(round(inputs.n * self.outliers), inputs.n - k)
        order = torch.sort(attention, descending=True, stable=True).indices
        return order[n_outliers : n_outliers + k].sort().values


METHOD = Damro
