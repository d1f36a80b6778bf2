"""ToMe: inside the vision tower, merge the rows that are most alike, a few after every layer.

Source: Bolya et al., 2022, arXiv:2210.09461 (released code: facebookresearch/ToMe).
Rows at even places are matched to those at odd ones by the cosine of their attention keys, the best pairs become their
mean weighted by what each stands for, and attention counts a merged row as often as rows went into it (`proportional`).
Departs from it: rows merge after the layer, not between its two halves; they alternate in reading order among what is
left. The number merged a layer follows from the budget, the same everywhere; where half the rows would not do, a layer
merges more than once. A merged row stands where its destination stood, with that one's position in towers that have
rotary positions. Towers with windows merge only after the layers with full attention; the CLS row never merges. Where
the tower cannot be cut, or with this as a stage after others, the same is done behind it, all at once.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.primitives.merge import bipartite, merge_into
from foveate.engine.reduce.cut import EncoderCut, whole_layer
from foveate.engine.vision import signals
from foveate.engine.vision.inputs import VisualInputs
from foveate.engine.vision.signals import Signal, Tower
from foveate.engine.vision.transform import TokenTransform


@dataclass(frozen=True, kw_only=True)
class ToMe(EncoderCut):
    """Every row goes on in one of those that are left."""

    source: ClassVar[str] = "arXiv:2210.09461"

    start: float = 0.0  # the layers it merges after, as shares of the depth
    stop: float = 1.0
    proportional: bool = True  # attention counts a row as often as what it stands for

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
