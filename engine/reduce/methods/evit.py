"""EViT: inside the vision tower, keep the patches it attends to and fuse the others into one.

Source: Liang et al., 2022, arXiv:2202.07800 (released code: youweiliang/evit).
At a few layers the rows that get the most attention of the CLS row go on, the rest as their mean weighted by it. The
later layers are shorter for it. The paper's layers 4, 7 and 10 of 12 are `layer=0.27` and two more, evenly up to the
end.
Departs from it: nothing is trained for it; rows are cut after the layer, not between its two halves; the fused row is a
true mean, which a model not trained for it reads rightly (`compat` restores the released sum of weights below 1), and
stands where the most attended of its members stood; at the next cut it is a row like any other. Keep rates follow from
the budget, in even steps. Without a CLS row attention received ranks the rows, and the tower's layers with windows are
passed over. Where the tower cannot be cut, or with this as a stage after others, the same is done once behind it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.primitives.merge import select_and_merge
from foveate.engine.primitives.ranking import complement, saliency, top
from foveate.engine.reduce.cut import EncoderCut, whole_layer
from foveate.engine.vision import signals
from foveate.engine.vision.inputs import VisualInputs
from foveate.engine.vision.signals import Signal, Tower
from foveate.engine.vision.transform import TokenTransform


@dataclass(frozen=True, kw_only=True)
class EViT(EncoderCut):
    """Reads the attention of the layers it cuts after; without fusing it is a selection."""

    source: ClassVar[str] = "arXiv:2202.07800"

    layer: float = 0.27  # the first, as a share of the depth
    cuts: int = 3  # evenly from there on
    fuse: bool = True  # False: the rest is dropped
    compat: bool = False  # weights of the fused row are the attention itself

    def __post_init__(self) -> None:
        if not 0.0 <= self.layer <= 1.0:
            raise ConfigError(f"layer: {self.layer} is not in [0, 1]")
        if not 1 <= self.cuts <= 16:
            raise ConfigError(f"cuts: {self.cuts} is not in 1..16")

    def layers(self, tower: Tower) -> tuple[int, ...]:
        shares = (self.layer + i * (1 - self.layer) / self.cuts for i in range(self.cuts))
        return tuple(sorted({whole_layer(tower, float(share)) for share in shares}))

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
