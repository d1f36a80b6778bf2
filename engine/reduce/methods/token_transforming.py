"""Token Transforming: keep the most attended tokens, and mix every token into all of them by similarity.

Source: Zeng et al., 2025, arXiv:2506.05709 (AuroraZengfh/TokenTransforming, which holds no code yet).
The method maps many tokens to many. The informative tokens are those that the encoder attends to most. Each token
shares out a mass of 1 among the informative tokens by a softmax over the cosines of attention keys. The attention on
the token weighs this mass.
Departs from the paper: the method is written from the paper's idea, so the temperature is ours. The paper cuts inside
the encoder at several depths; this method cuts once, after the encoder. Rows are mixed before the projector, or after
the projector if the encoder merges patches. Without a CLS row, attention received takes the place of CLS's attention. A
row stands where its informative token stood.
"""

from dataclasses import dataclass
from typing import ClassVar

from foveate.configs.errors import ConfigError
from foveate.engine.common import ENC, Signal, Tower, signals
from foveate.engine.primitives.ranking import saliency, top, unit
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import TokenTransform, VisualInputs

_LEAST = 1e-6  # share of the mean importance, added to all tokens: no row is empty where attention is 0


@dataclass(frozen=True, kw_only=True)
class TokenTransforming(Reducer):
    """W is dense: k * n numbers, none negative."""

    source: ClassVar[str] = "arXiv:2506.05709"
    group: ClassVar[Group] = "select and merge"

    temperature: float = 0.1  # of the softmax; small: a token joins only the nearest informative token

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
