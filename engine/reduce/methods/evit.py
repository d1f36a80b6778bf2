"""EViT: inside the vision tower, keep the most attended patches and fuse the other patches into one.

Source: Liang et al., 2022, arXiv:2202.07800 (released code: youweiliang/evit).
After each of a few layers, the rows with the most attention of the CLS row stay, and one row replaces the others: their
mean, weighted by attention. So the later layers run on fewer rows. The defaults give the paper's layers: the fourth,
seventh and tenth of 12, which split the depth into four equal parts (indices 3, 6 and 9; the rows are fewer before the
layers of index 4, 7 and 10).
Departs from the paper: nothing is trained for the method. Rows are cut after the layer, not between its two halves. The
fused row is a true mean, which a model without training for it reads correctly; `compat` restores the released sum of
weights below 1. The fused row stands where its most attended member stood. At the next cut the fused row is a row like
any other. Keep rates follow from the budget, in even steps. Without a CLS row, attention received ranks the rows.
Layers with windowed attention are skipped. If the tower cannot be cut, or if the method follows other methods, the
method acts once, behind the tower.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import Signal, Tower, signals
from foveate.engine.primitives.merge import select_and_merge
from foveate.engine.primitives.ranking import complement, saliency, top
from foveate.engine.reduce.cut import EncoderCut, whole_layer
from foveate.engine.vision import TokenTransform, VisualInputs


@dataclass(frozen=True, kw_only=True)
class EViT(EncoderCut):
    """Reads the attention of the layers after which it cuts. Without fusing, the result is a selection."""

    source: ClassVar[str] = "arXiv:2202.07800"

    # The index depth / 4 as a share of the last index, depth - 1, is a little more than a quarter.
    layer: float = 0.26  # the first layer to cut after, as a share of the depth
    cuts: int = 3  # number of cuts, in equal steps from `layer` to the end of the tower
    fuse: bool = True  # fuse the other patches into one; False: drop them
    compat: bool = False  # the weights of the fused row are the attention itself, as released

    def __post_init__(self) -> None:
        if not 0.0 <= self.layer <= 1.0:
            raise ConfigError(f"layer: {self.layer} is not in [0, 1]")
        if not 1 <= self.cuts <= 16:
            raise ConfigError(f"cuts: {self.cuts} is not in 1..16")

    def layers(self, tower: Tower) -> tuple[int, ...]:
        first = tower.layer(float(self.layer))
        steps = (round(first + i * (tower.depth - first) / self.cuts) for i in range(self.cuts))
        return tuple(sorted({whole_layer(tower, min(layer, tower.depth - 1)) for layer in steps}))

    def signals_at(self, layer: int) -> frozenset[Signal]:
        return frozenset({signals.saliency(layer)})

    def cut(self, inputs: VisualInputs, k: int, layer: int, size: Tensor) -> TokenTransform:
        attention = saliency(inputs, layer).cpu()
        if not self.fuse:
            return TokenTransform.selection(top(attention, k), inputs.n)
        kept = top(attention, k - 1)
        rest = complement(kept, inputs.n)
        target = rest[attention[rest].argmax(0, keepdim=True)]
        weights = attention
        if not self.compat:
            mass = attention[rest].sum()
            weights = attention / mass if mass > 0 else torch.full_like(attention, 1 / len(rest))
        return select_and_merge(kept, target, target.expand(inputs.n), weights, inputs.space)


METHOD = EViT
