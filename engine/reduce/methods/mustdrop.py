"""MustDrop: merge 3 x 3 windows of similar tokens, the most similar first, and keep the most attended rows.

Source: Liu et al., 2024, arXiv:2411.10803 (released code: liuting20/MustDrop), its stage at the encoder.
Windows do not overlap and start at the upper left. The similarity of a window is the mean cosine of its tokens after
the encoder's first layer. A window of similarity 0.8 or more becomes its mean. Cells beyond the last whole window stay
as they are.
Departs from the paper: the budget sets the count. Windows merge only until the budget is met; of the last window, only
the least attended tokens merge. If all similar windows are merged and there are still too many rows, the least attended
rows are dropped. So the paper's protected tokens, the most attended ones, stay longest. Rows merge behind the encoder,
which runs in full; the paper merges after the first layer. Attention is that of the layer whose output the projector
reads, because the paper's layer after it does not run. The attention of a merged row is the mean over its members.
Without a CLS row, the method reads attention received. A merged row stands at the window's centre; the released code
takes the window's last cell (`compat`). The stage in the prefill is the method `mustdrop2`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import ENC, Signal, Tower, signals
from foveate.engine.primitives.math import window_cosine
from foveate.engine.primitives.ranking import saliency, top
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import TokenTransform, VisualInputs

_SIDE = 3
_GAIN = _SIDE * _SIDE - 1  # rows saved by one merged window
_FROM_CENTRE = (4, 1, 3, 5, 7, 0, 2, 6, 8)  # the cells of a window, nearest to its centre first


@dataclass(frozen=True, kw_only=True)
class MustDrop(Reducer):
    """No token is dropped while there are windows to merge."""

    source: ClassVar[str] = "arXiv:2411.10803"
    group: ClassVar[Group] = "select and merge"
    whole_grid: ClassVar[bool] = True

    threshold: float = 0.8  # least mean cosine of a window that may merge; above 1: no window merges
    compat: bool = False  # a merged row stands at the window's last cell, as released

    def __post_init__(self) -> None:
        if not -1.0 <= self.threshold <= 2.0:
            raise ConfigError(f"threshold: {self.threshold} is not in [-1, 2]")

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({signals.hidden(0.0), signals.saliency(), ENC})

    def transform(self, inputs: VisualInputs, k: int) -> TokenTransform:
        n, attention = inputs.n, saliency(inputs).cpu()
        into = self._merged(inputs, attention, n - k)
        rows, size = torch.unique(into, return_counts=True)
        mass = torch.bincount(into, weights=attention.double(), minlength=n)[rows] / size
        kept = rows[top(mass.float(), k)]
        if len(rows) == n:
            return TokenTransform.selection(kept, n)
        place = torch.full((n,), -1).index_copy_(0, kept, torch.arange(k))
        return TokenTransform.merging(place[into], kept, space=inputs.space)

    def _merged(self, inputs: VisualInputs, attention: Tensor, excess: int) -> Tensor:
        """[n] int64: the row that each row merges into. `excess` rows disappear, or fewer if the windows run out."""
        into = torch.arange(inputs.n)
        windows = self._windows(inputs)
        n_whole = min(len(windows), excess // _GAIN)
        whole = windows[:n_whole]
        into[whole] = whole[:, self._anchor(_FROM_CENTRE), None]
        excess -= n_whole * _GAIN
        if excess and n_whole < len(windows):
            window = windows[n_whole]
            least = torch.sort(attention[window], descending=True, stable=True).indices[-excess - 1 :]
            into[window[least]] = window[self._anchor(least.tolist())]
        return into

    def _anchor(self, cells: Sequence[int]) -> int:
        """The one of these cells of a window whose place the merged row takes."""
        return max(cells) if self.compat else next(cell for cell in _FROM_CENTRE if cell in cells)

    def _windows(self, inputs: VisualInputs) -> Tensor:
        """[w, 9] int64: the cells of each window that may merge, the most similar window first."""
        grid = inputs.grid
        down, across = grid.rows // _SIDE, grid.cols // _SIDE
        if not down * across:
            return torch.empty(0, _SIDE * _SIDE, dtype=torch.int64)
        alike = window_cosine(inputs.hidden(0.0), grid, _SIDE).flatten().cpu()
        order = torch.sort(alike, descending=True, stable=True).indices
        order = order[alike[order] >= self.threshold]
        corner = order // across * _SIDE * grid.cols + order % across * _SIDE
        step = torch.arange(_SIDE)
        return corner[:, None] + (step[:, None] * grid.cols + step).flatten()


METHOD = MustDrop
