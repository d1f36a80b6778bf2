"""Token Transforming: mix every token into all of the most attended ones, by how alike they are.

Source: Zeng et al., 2025, arXiv:2506.05709 (AuroraZengfh/TokenTransforming, which holds no code yet).
Many to many: the informative tokens are those that the encoder attends to most; each token shares out a mass of 1 among
them by a softmax over the cosines of attention keys, and counts by the attention it gets itself.
Departs from it: written from the paper's idea, so the temperature is ours; the paper cuts inside the encoder at several
depths, while this is one cut after it; before the projector where the encoder gives such rows, after it where it merges
patches; without a CLS row, attention received takes the place of CLS's. A row stands where its informative token stood.
"""

from dataclasses import dataclass
from typing import ClassVar

from foveate.configs.errors import ConfigError
from foveate.engine.primitives.ranking import saliency, top, unit
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import signals
from foveate.engine.vision.inputs import VisualInputs
from foveate.engine.vision.signals import ENC, Signal, Tower
from foveate.engine.vision.transform import TokenTransform

_LEAST = 1e-6  # of the mean importance, added to all: no row is made of nothing, even where attention is 0


@dataclass(frozen=True, kw_only=True)
class TokenTransforming(Reducer):
    """A dense W of k * n numbers, none negative."""

    source: ClassVar[str] = "arXiv:2506.05709"
    group: ClassVar[Group] = "select and merge"

    temperature: float = 0.1  # of the softmax over cosines: small merges each token into the nearest informative one

    def __post_init__(self) -> None:
        if not 0.001 <= self.temperature <= 10.0:
            raise ConfigError(f"temperature: {self.temperature} is not in [0.001, 10]")

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({signals.saliency(), signals.keys(), ENC})

    def transform(self, inputs: VisualInputs, k: int) -> TokenTransform:
        worth = saliency(inputs)
        keys = unit(inputs.keys())
        informative = top(worth, k)
        share = (keys @ keys[informative].T / self.temperature).softmax(1)  # [n, k], rows sum to 1
        importance = worth / worth.mean().clamp(min=1e-30) + _LEAST
        mix = (share * importance[:, None]).T
        return TokenTransform.dense(mix / mix.sum(1, keepdim=True), informative, share.argmax(1), inputs.space)


METHOD = TokenTransforming
