"""What a tower records for the reducers while it runs: only what was asked for, at the layers it was asked of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foveate.engine.vision.signals import Kind, Signal
from foveate.kernels.attention_rows import attention_rows
from foveate.kernels.received import received

_OF_ATTENTION = frozenset({"cls_row", "cls_cat", "recv", "keys", "keys_cat", "values", "qk"})


@dataclass(slots=True)
class Taps:
    """Filled layer by layer; rows are the tower's, packed over all pictures of the batch."""

    wanted: frozenset[Signal]  # resolved
    bounds: Sequence[int]  # [n_images + 1] rows of each picture
    has_cls: bool  # whether row bounds[i] is a CLS row
    found: dict[Signal, Tensor] = field(default_factory=dict)  # [n, ...] each; qk [n, 2, heads, d]

    def at(self, layer: int) -> "LayerTaps | None":
        """What the attention of that layer has to record; None: nothing."""
        kinds = frozenset(s.kind for s in self.wanted if s.layer == layer and s.kind in _OF_ATTENTION)
        return LayerTaps(self, layer, kinds) if kinds else None

    def record_rows(self, layer: int, rows: Tensor) -> None:
        """Called with the rows [n, C] that the layer leaves."""
        signal = Signal("hidden", layer)
        if signal in self.wanted:
            self.found[signal] = rows.float().clone()


@dataclass(frozen=True, slots=True)
class LayerTaps:
    """One layer's recorder. Each method is called once."""

    taps: Taps
    layer: int
    kinds: frozenset[Kind]

    def record_projections(self, raw_keys: Tensor, values: Tensor) -> None:
        """Called with the key and value projections [n, heads, d], keys not rotated."""
        self._keep("keys", lambda: raw_keys.float().mean(1))
        self._keep("keys_cat", lambda: raw_keys.float().flatten(1))
        self._keep("values", lambda: values.float().clone())

    def record_attention(self, q: Tensor, k: Tensor, segments: Sequence[int], scale: float) -> None:
        """Called with [n, heads, d] queries and keys as attention sees them.

        Args:
            segments: [n_segments + 1] what attends to what at this layer.
        """
        self._keep("recv", lambda: received(q, k, segments, scale))
        self._keep("qk", lambda: torch.stack([q, k], 1))
        if self.taps.has_cls:
            self._keep("cls_row", lambda: self._cls(q, k, scale))
            wide = q.shape[1] * q.shape[2]
            self._keep("cls_cat", lambda: self._cls(q.flatten(1)[:, None], k.flatten(1)[:, None], wide**-0.5))

    def _cls(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        spans = zip(self.taps.bounds[:-1], self.taps.bounds[1:], strict=True)
        return torch.cat([attention_rows(q[a : a + 1], k[a:b], scale)[0] for a, b in spans])

    def _keep(self, kind: Kind, make: Callable[[], Tensor]) -> None:
        if kind in self.kinds:
            self.taps.found[Signal(kind, self.layer)] = make()
