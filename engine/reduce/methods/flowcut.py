"""FlowCut: keep the tokens that score best over the encoder's layers in attention, similarity and value norm.

Source: Tong et al., 2025, arXiv:2505.19536 (released code: TungChintao/FlowCut).
At each layer, the score of a token is the sum of its share of CLS's attention and its share of likeness to CLS's own
value, times the length of its own value. The score so far and the score of the layer weigh the same. At every second
layer the worst tokens are dropped: the more, the farther attention is from uniform and the fewer layers follow. At the
last layer but one that runs, k tokens are left.
Departs from the paper: the encoder runs on all tokens, and the method reads the layers afterwards. So the choice costs
time where the paper's saves time, and deeper layers are those of the whole picture. Attention and likeness are
normalised over the tokens left. Without a CLS row, attention received stands for CLS's attention, and the mean value of
the tokens left for CLS's value; the released code for Qwen2-VL takes the attention of the mean query, no likeness, and
also cuts at the last layer. In encoders with windowed attention, only the layers with full attention count. On Qwen2-VL
and for pictures in tiles, the paper drops a part inside the language model; here one rule drops all tokens, and each
tile is cut by itself.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import Signal, Tower, signals
from foveate.engine.primitives.ranking import finite, saliency, top
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import VisualInputs

_EPS = 1e-12


@dataclass(frozen=True, kw_only=True)
class FlowCut(Reducer):
    """Reads attention and values of almost all layers: n * C floats of memory for each layer."""

    source: ClassVar[str] = "arXiv:2505.19536"
    group: ClassVar[Group] = "by attention"

    memory: float = 0.5  # weight of the score so far; the score of the layer weighs the rest
    every: int = 2  # layers from one cut to the next

    def __post_init__(self) -> None:
        if not 0.0 <= self.memory < 1.0:
            raise ConfigError(f"memory: {self.memory} is not in [0, 1)")
        if not 1 <= self.every <= 100:
            raise ConfigError(f"every: {self.every} is not in [1, 100]")

    def needs(self, tower: Tower) -> frozenset[Signal]:
        kinds = [signals.saliency, signals.values, *([signals.cls_values] if tower.has_cls else [])]
        return frozenset(kind(layer) for layer in _layers(tower) for kind in kinds)

    def select(self, inputs: VisualInputs, k: int) -> Tensor:
        layers = _layers(inputs.tower)
        kept = torch.arange(inputs.n, device=inputs.proj.device)
        total: Tensor | None = None
        for follow, layer in zip(reversed(range(len(layers))), layers, strict=True):
            attention = saliency(inputs, layer)[kept]
            attention = attention / attention.sum().clamp(min=_EPS)
            values = finite("attention values", inputs.values(layer))[kept]
            likeness = _likeness_to_cls(inputs, layer, kept) if inputs.tower.has_cls else _likeness_to_mean(values)
            score = (attention + likeness) * values.mean(1).abs().sum(1)
            total = score if total is None else self.memory * total + (1 - self.memory) * score
            if follow % self.every == 0:
                stay = top(total, len(kept) - _n_pruned(attention, k, follow))
                kept, total = kept[stay], total[stay]
            if len(kept) == k:
                break
        return kept


def _layers(tower: Tower) -> tuple[int, ...]:
    """The layers with full attention, up to the last layer but one that runs."""
    full = tower.full_layers or tuple(range(tower.depth))
    return tuple(layer for layer in full if layer < tower.depth - 1) or full[-1:]


def _likeness_to_cls(inputs: VisualInputs, layer: int, kept: Tensor) -> Tensor:
    """[m] float32, with sum 1: of one softmax per head over CLS and the m tokens left, the mean over heads."""
    products = finite("attention values", inputs.cls_values(layer))[kept]
    with_cls = torch.nn.functional.pad(products, (0, 0, 1, 0))  # CLS's own is 0, as the signal is defined
    likeness = with_cls.softmax(0)[1:].mean(1)
    return likeness / likeness.sum().clamp(min=_EPS)


def _likeness_to_mean(values: Tensor) -> Tensor:
    """[m] float32, with sum 1: the same for values [m, heads, d] and their mean in CLS's place."""
    return torch.einsum("mhd,hd->mh", values, values.mean(0)).softmax(0).mean(1)


def _n_pruned(attention: Tensor, k: int, follow: int) -> int:
    """Number of tokens to drop at a layer before the last `follow` layers."""
    n = len(attention)
    if follow == 0:
        return n - k
    evenness = float(torch.special.entr(attention.double()).sum()) / math.log(n)
    return min(max(round((n - k) / math.sqrt(follow) * (1 - evenness**2)), 0), n - k)


METHOD = FlowCut
