"""MCTF: inside the vision tower, merge similar, little attended and small rows, a few after every layer.

Source: Lee et al., 2024, arXiv:2403.10030 (released code: mlvlab/MCTF).
The attraction of two rows is their cosine, scaled to 0..1, times the inverse of the attention that both receive, to a
power, times the inverse of their sizes, to a power. The size of a row is the number of cells that it stands for. Of the
rows that a layer loses, half go from even places to the odd rows that attract them most. Then as many go from odd
places to the even rows that are left. A merged row is the mean of its members, weighted by attention times size.
Departs from the paper: nothing is trained for the method. Rows merge after the layer and by the attention of that
layer. The paper looks one layer ahead; here a layer attends over the rows that it is given. Everything else is as in
`tome`: the number of merges in a layer, places, towers with windows, the behaviour behind a tower that cannot be cut,
and the CLS row, which has a place in the released code and none here, so that other rows are even and odd.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import Signal, signals
from foveate.engine.primitives.merge import merge_into
from foveate.engine.primitives.ranking import complement, finite, top, unit
from foveate.engine.reduce.methods.tome import ToMe
from foveate.engine.vision import TokenTransform, VisualInputs

_LEAST = 1e-6  # least likeness and least attention


@dataclass(frozen=True, kw_only=True)
class MCTF(ToMe):
    """Reads the rows and the attention that each row receives."""

    source: ClassVar[str] = "arXiv:2403.10030"

    info: float = 0.05  # power of the attention received; the cosine has power 1; 0: attention is not used
    size: float = 0.025  # power of the number of cells that a row stands for

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
        """[n] int64: the row that each row merges into; a row that stays has itself."""
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
        return into[into]  # the members of a merged odd row move with it


METHOD = MCTF
