"""MCTF: inside the vision tower, merge rows that are alike, little looked at and small, a few after every layer.

Source: Lee et al., 2024, arXiv:2403.10030 (released code: mlvlab/MCTF).
Two rows attract each other by their cosine, brought to 0..1, times the inverse of the attention both receive and of
what both stand for, each to a power. Of the rows a layer loses, half go from even places to the odd ones they are most
drawn to, then as many from odd places to the even ones that are left. A merged row is the mean of its members, weighted
by attention times what they stand for.
Departs from it: nothing is trained for it; rows merge after the layer and by its own attention, where the paper looks
one layer ahead, since a layer here attends over the rows it is given. In all else it is as `tome`: how many merge in a
layer, places, the CLS row, towers with windows, and what happens behind a tower that cannot be cut.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.primitives.merge import merge_into
from foveate.engine.primitives.ranking import complement, finite, top, unit
from foveate.engine.reduce.methods.tome import ToMe
from foveate.engine.vision import signals
from foveate.engine.vision.inputs import VisualInputs
from foveate.engine.vision.signals import Signal
from foveate.engine.vision.transform import TokenTransform

_LEAST = 1e-6  # below it, likeness and attention count as this


@dataclass(frozen=True, kw_only=True)
class MCTF(ToMe):
    """Reads the attention each row receives and the rows themselves."""

    source: ClassVar[str] = "arXiv:2403.10030"

    info: float = 0.05  # power of attention received, beside 1 of likeness; 0: not looked at
    size: float = 0.025  # power of what a row stands for

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, value in (("info", self.info), ("size", self.size)):
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{field}: {value} is not in [0, 1]")

    def signals_at(self, layer: int) -> frozenset[Signal]:
        return frozenset({signals.recv(layer)})

    def cut(self, inputs: VisualInputs, k: int, layer: int, size: Tensor) -> TokenTransform:
        rows = finite("features", inputs.proj)
        worth = finite("attention weights", inputs.recv(layer)).cpu()
        whole = TokenTransform.identity(inputs.n)
        while whole.n_out > k:
            n_merged = min(whole.n_out - k, whole.n_out // 2)
            step = merge_into(self._into(rows, worth, size, n_merged), worth.clamp(min=_LEAST) * size, inputs.space)
            rows = step.mix(rows)
            worth, size = (torch.zeros(step.n_out).index_add_(0, step.back, old) for old in (worth, size))
            whole = step if whole.is_identity else whole.then(step)
        return whole

    def _into(self, rows: Tensor, worth: Tensor, size: Tensor, n_merged: int) -> Tensor:
        """[n] int64: the row each row goes into, itself if it stays."""
        rows = unit(rows).cpu()
        repulsion = self.info * worth.clamp(min=_LEAST).log() + self.size * size.log()
        likeness = ((rows[::2] @ rows[1::2].T + 1) / 2).clamp(min=_LEAST).log()
        score = likeness - repulsion[::2, None] - repulsion[1::2]  # [even, odd], logarithms
        into = torch.arange(len(rows))
        best, odd = score.max(1)
        going = top(best, n_merged // 2)
        into[2 * going] = 2 * odd[going] + 1
        left = complement(going, len(best))
        best, even = score[left].max(0)
        going = top(best, n_merged - n_merged // 2)
        into[2 * going + 1] = 2 * left[even[going]]
        return into[into]  # what an odd row took along goes on with it


METHOD = MCTF
