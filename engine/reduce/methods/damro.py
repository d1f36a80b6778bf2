"""DAMRO: drop the outliers that draw most of the encoder's attention, keep the tokens it attends to most of the rest.

Source: Gong et al., 2024, arXiv:2410.04514 (released code: coder-gx/DAMRO).
The tokens with the largest weight in one softmax over CLS's attention of all heads are taken for background that
stores what concerns the whole picture, and misleads the answer.
Departs from it: the paper keeps all tokens and decodes a second time with the outliers alone, whose logits it takes
off; here the outliers are dropped, which is our use of its filter, and the budget is filled with the next by the same
attention. Where that is not enough, outliers are kept, the weakest first. How many there are is a share of the tokens:
the paper's 10 of LLaVA-1.5's 576, and about its 4 of InstructBLIP's 257. Without a CLS row, attention received is read.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.primitives.ranking import finite
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import signals
from foveate.engine.vision.inputs import VisualInputs
from foveate.engine.vision.signals import Signal, Tower


@dataclass(frozen=True, kw_only=True)
class Damro(Reducer):
    """Reads one attention row; the features do not matter."""

    source: ClassVar[str] = "arXiv:2410.04514"
    group: ClassVar[Group] = "by attention"

    outliers: float = 10 / 576  # share of the tokens, to the nearest one

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
