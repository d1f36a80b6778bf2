"""FlowCut: keep the tokens that attention, meaning and weight single out layer after layer of the encoder.

Source: Tong et al., 2025, arXiv:2505.19536 (released code: TungChintao/FlowCut).
At each layer a token's score is its share of CLS's attention plus its share of likeness to CLS's value, times the
length of its own value; the score so far and the layer's weigh the same. At every second layer the worst go, the more
the farther attention is from uniform and the fewer layers follow; at the last but one layer run, k are left.
Departs from it: the encoder itself runs on all tokens, and layers are read as it leaves them, so the choice costs time
where the paper's saves it. Attention and likeness are shared out among the tokens left. The mean value of all tokens
stands for CLS's, which is not tapped; without a CLS row, attention received stands for its attention; and in encoders
that attend in windows, only the layers with full attention count. On Qwen2-VL the paper drops the last half inside
the language model; here all goes by the one rule.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.primitives.ranking import finite, saliency, top
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import signals
from foveate.engine.vision.inputs import VisualInputs
from foveate.engine.vision.signals import Signal, Tower

_EPS = 1e-12


@dataclass(frozen=True, kw_only=True)
class FlowCut(Reducer):
    """Reads attention and values of almost all layers: n * C floats of memory for each of them."""

    source: ClassVar[str] = "arXiv:2505.19536"
    group: ClassVar[Group] = "by attention"

    memory: float = 0.5  # weight of the score so far beside the layer's
    every: int = 2  # layers from one pruning to the next

    def __post_init__(self) -> None:
        if not 0.0 <= self.memory < 1.0:
            raise ConfigError(f"memory: {self.memory} is not in [0, 1)")
        if not 1 <= self.every <= 100:
            raise ConfigError(f"every: {self.every} is not in [1, 100]")

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset(s for layer in _layers(tower) for s in (signals.saliency(layer), signals.values(layer)))

    def select(self, inputs: VisualInputs, k: int) -> Tensor:
        layers = _layers(inputs.tower)
        kept = torch.arange(inputs.n, device=inputs.proj.device)
        total: Tensor | None = None
        for follow, layer in zip(reversed(range(len(layers))), layers, strict=True):
            attention = saliency(inputs, layer)[kept]
            attention = attention / attention.sum().clamp(min=_EPS)
            score = _score(attention, finite("attention values", inputs.values(layer))[kept])
            total = score if total is None else self.memory * total + (1 - self.memory) * score
            if follow % self.every == 0:
                stay = top(total, len(kept) - _n_pruned(attention, k, follow))
                kept, total = kept[stay], total[stay]
            if len(kept) == k:
                break
        return kept


def _layers(tower: Tower) -> tuple[int, ...]:
    """Those with full attention up to the last but one that is run."""
    full = tower.full_layers or tuple(range(tower.depth))
    return tuple(layer for layer in full if layer < tower.depth - 1) or full[-1:]


def _score(attention: Tensor, values: Tensor) -> Tensor:
    """[m] float32 of attention [m] that sums to 1 and values [m, heads, d]."""
    likeness = torch.einsum("mhd,hd->mh", values, values.mean(0)).softmax(0).mean(1)
    return (attention + likeness) * values.mean(1).abs().sum(1)


def _n_pruned(attention: Tensor, k: int, follow: int) -> int:
    """How many of the tokens left go at a layer after which `follow` more are looked at."""
    n = len(attention)
    if follow == 0:
        return n - k
    evenness = float(torch.special.entr(attention.double()).sum()) / math.log(n)
    return min(max(round((n - k) / math.sqrt(follow) * (1 - evenness**2)), 0), n - k)


METHOD = FlowCut
