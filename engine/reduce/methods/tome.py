"""ToMe: inside the vision tower, merge the most similar rows, a few after every layer.

Source: Bolya et al., 2022, arXiv:2210.09461 (released code: facebookresearch/ToMe).
Rows at even places are matched to rows at odd places by the cosine of their attention keys. The best pairs become their
mean, weighted by the number of cells that each row stands for. Attention counts a merged row as often as rows went into
it (`proportional`).
Departs from the paper: rows merge after the layer, not between its two halves. Even and odd places alternate in reading
order among the rows left. The number of merges in a layer follows from the budget and is the same in every layer. If
half of the rows is not enough, a layer merges more than once. A merged row stands where its destination stood, with the
destination's position in towers with rotary positions. Towers with windows merge only after layers with full attention.
The CLS row never merges and has no place: even and odd count from the first patch. In the released code the CLS row is
place 0 and never merges either, so patches that are sources here are destinations there, and the groups differ (of 576
patches, 90 % of the groups are equal at 8 merges, 55 % at 100, 17 % at 288). If the tower cannot be cut, or if the
method follows other methods, all merges happen behind the tower, at once.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import Signal, Tower, signals
from foveate.engine.primitives.merge import bipartite, merge_into
from foveate.engine.reduce.cut import EncoderCut, whole_layer
from foveate.engine.vision import TokenTransform, VisualInputs


@dataclass(frozen=True, kw_only=True)
class ToMe(EncoderCut):
    """Every row is part of exactly one of the rows left."""

    source: ClassVar[str] = "arXiv:2210.09461"

    start: float = 0.0  # the first layer to merge after, as a share of the depth
    stop: float = 1.0  # the last layer to merge after, as a share of the depth
    proportional: bool = True  # attention counts a row as often as the rows that went into it

    def __post_init__(self) -> None:
        if not 0.0 <= self.start <= self.stop <= 1.0:
            raise ConfigError(f"start: {self.start} and stop {self.stop} are not in order in [0, 1]")

    def layers(self, tower: Tower) -> tuple[int, ...]:
        span = range(tower.layer(self.start), tower.layer(self.stop) + 1)
        return tuple(sorted({whole_layer(tower, layer) for layer in span}))

    def signals_at(self, layer: int) -> frozenset[Signal]:
        return frozenset({signals.keys(layer)})

    def counts(self, n: int, k: int, n_layers: int) -> list[int]:
        return [n - (n - k) * (i + 1) // n_layers for i in range(n_layers)]

    def is_weighing(self) -> bool:
        return self.proportional

    def cut(self, inputs: VisualInputs, k: int, layer: int, size: Tensor) -> TokenTransform:
        metric = inputs.keys(layer)
        whole = TokenTransform.identity(inputs.n)
        while whole.n_out > k:
            step = merge_into(bipartite(metric, whole.n_out - k), size, inputs.space)
            size = torch.zeros(step.n_out).index_add_(0, step.back, size)
            metric = step.mix(metric)
            whole = step if whole.is_identity else whole.then(step)
        return whole


METHOD = ToMe
