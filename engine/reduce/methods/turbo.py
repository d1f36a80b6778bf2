"""Turbo: merge similar tokens that the encoder attends to little, layer by layer of the encoder.

Source: Ju et al., 2024, arXiv:2407.11717 (released code: anakin-skywalker-Joseph/Turbo).
At each layer, every other row is matched with the most similar of the remaining rows by the cosine of their attention
keys. From the cosine, the method subtracts 30 times the attention that CLS pays to the row that would merge away. The
best pairs merge, weighted by the tokens in each row. Each layer merges the same number of rows.
Departs from the paper: the method acts after the encoder, on the keys and the attention of some of its layers. The
paper merges inside every block, adds log(size) to attention and merges text too. The keys of a merged row are the mean
over its tokens, and its attention is the sum over its tokens, as log(size) makes it. The budget sets the number of
merges, so no least number of rows ends them. The last layer merges more if halves were not enough. Attention is scaled
to a mean of 1/576, the mean at the picture sizes that the paper was tuned on, so `alpha` means the same for any size
and encoder (`compat` does not scale). Without a CLS row, the method reads attention received. Even and odd rows count
from the first patch; the released code counts from the CLS row, so its sources are the destinations here. Rows are
mixed before the projector, or after the projector if the encoder merges patches.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import ENC, Signal, Tower, signals
from foveate.engine.primitives.merge import Pass, evenly, merge_by_layers
from foveate.engine.primitives.ranking import saliency
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import TokenTransform, VisualInputs

_FACTOR = 30.0  # weight of attention against cosine, as released
_USUAL = 576  # tokens of the pictures that the paper was tuned on


@dataclass(frozen=True, kw_only=True)
class Turbo(Reducer):
    """Every source token is in exactly one output row, the plain mean of its tokens."""

    source: ClassVar[str] = "arXiv:2407.11717"
    group: ClassVar[Group] = "select and merge"

    alpha: float = 1.0  # how much attention protects a row from merging; 0: similarity alone
    beta: float = 1.0  # factor on `alpha` for each layer away from `gamma`
    gamma: int = 0  # index of the layer where attention protects most
    n_layers: int = 4  # layers to merge by: evenly over the depth, the last layer included
    compat: bool = False  # attention is not scaled to the picture's size, as released

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1000.0:
            raise ConfigError(f"alpha: {self.alpha} is not in [0, 1000]")
        if not 0.0 < self.beta <= 1.0:
            raise ConfigError(f"beta: {self.beta} is not in (0, 1]")
        if not 0 <= self.gamma <= 1000:
            raise ConfigError(f"gamma: {self.gamma} is not in 0..1000")
        if not 1 <= self.n_layers <= 64:
            raise ConfigError(f"n_layers: {self.n_layers} is not in 1..64")

    def needs(self, tower: Tower) -> frozenset[Signal]:
        kinds = (signals.keys, signals.saliency)
        return frozenset({ENC, *(kind(layer) for kind in kinds for layer in evenly(self.n_layers))})

    def transform(self, inputs: VisualInputs, k: int) -> TokenTransform:
        def decide(now: Pass) -> tuple[int, Tensor | None]:
            each = -(-now.n_over // max(1, now.n_layers_left))  # rounded up
            return each, -(now.member @ self._value(inputs, now.layer))

        return merge_by_layers(inputs, k, evenly(self.n_layers), decide)

    def _value(self, inputs: VisualInputs, layer: float) -> Tensor:
        """[n] float32: the amount to subtract from the cosine of a row that would merge away."""
        weight = _FACTOR * self.alpha * self.beta ** abs(self.gamma - inputs.tower.layer(layer))
        attention = saliency(inputs, layer)
        if not self.compat:
            attention = attention / attention.mean().clamp(min=1e-30) / _USUAL
        return weight * attention


METHOD = Turbo
