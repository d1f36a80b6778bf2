"""VTC-CLS: keep the tokens that the encoder's CLS row attends to most, summed over its layers.

Source: Wang et al., 2024, arXiv:2412.05819 (released code: THU-MIG/VTC-CLS).
The score of a token is the sum of its CLS attention from layer `start` to the layer whose output the projector reads.
Departs from the paper: `start`, which the released scripts set per benchmark, is the first layer, as for GQA; 1.0 is
the last layer alone, which is FasterVLM. If the encoder has no CLS row, the method reads attention received, at the
price of one pass over all pairs of tokens per layer. Layers with windowed attention do not count, and no layer counts
twice. Kept tokens keep their positions in the prompt.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import LayerRef, Signal, Tower, signals
from foveate.engine.primitives.ranking import finite, top
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import VisualInputs


@dataclass(frozen=True, kw_only=True)
class VtcCls(Reducer):
    """Reads one attention row per layer and no features."""

    source: ClassVar[str] = "arXiv:2412.05819"
    group: ClassVar[Group] = "by attention"

    start: float = 0.0  # the first layer that counts, as a share of the depth
    combine: Literal["sum", "min", "max"] = "sum"  # how the attention on a token over the layers becomes its score

    def __post_init__(self) -> None:
        if not 0.0 <= self.start <= 1.0:
            raise ConfigError(f"start: {self.start} is not in [0, 1]")

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset(signals.saliency(layer) for layer in self._layers(tower))

    def select(self, inputs: VisualInputs, k: int) -> Tensor:
        layers = torch.stack([inputs.saliency(layer) for layer in self._layers(inputs.tower)])  # [layers, n]
        scores = finite("attention weights", layers)
        if self.combine == "sum":
            return top(scores.sum(0), k)
        return top(scores.amin(0) if self.combine == "min" else scores.amax(0), k)

    def _layers(self, tower: Tower) -> list[LayerRef]:
        """The layers that count, ascending."""
        run = range(tower.layer(self.start), tower.depth)
        return sorted({tower.resolve(signals.saliency(layer)).layer for layer in run})


METHOD = VtcCls
