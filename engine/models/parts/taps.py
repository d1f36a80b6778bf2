"""What a tower records for the reducers while it runs: only what was asked for, at one layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.engine.reduce.base import Signal
from foveate.kernels.vision_attention import attention_rows, received


@dataclass(slots=True)
class Taps:
    """Filled by the tapped layer's attention; rows are the tower's, packed over all pictures of the batch."""

    wanted: frozenset[Signal]
    bounds: Sequence[int]  # [n_images + 1] rows of each picture
    has_cls: bool  # whether row bounds[i] is a CLS row
    cls_attention: Tensor | None = None  # [n] float32
    received: Tensor | None = None  # [n] float32
    keys: Tensor | None = None  # [n, head_dim] float32

    def record_keys(self, raw_keys: Tensor) -> None:
        """Called once, with the key projection [n, heads, head_dim] before it is rotated."""
        if "keys" in self.wanted:
            self.keys = raw_keys.float().mean(1)

    def record(self, q: Tensor, k: Tensor, segments: Sequence[int], scale: float) -> None:
        """Called once, with [n, heads, head_dim] queries and keys as attention sees them.

        Args:
            segments: [n_segments + 1] what attends to what at this layer.
        """
        if "received" in self.wanted:
            self.received = received(q, k, segments, scale)
        if "cls_attention" in self.wanted and self.has_cls:
            spans = zip(self.bounds[:-1], self.bounds[1:], strict=True)
            self.cls_attention = torch.cat([attention_rows(q[a : a + 1], k[a:b], scale)[0] for a, b in spans])
