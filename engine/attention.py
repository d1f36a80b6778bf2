"""Attention backends: how the layers of a decoder store keys and values and attend over the paged cache.

    reference   plain torch operations, the definition; any device
    cpu         the C++ kernels; several layers over a few rows are one call
    cuda        torch operations on the GPU today; the place of fused kernels and of CUDA graphs

The runner prepares a backend for each batch. A decoder calls `attend` for each layer, or `run_layers` for several
layers. All backends read the same batch and leave the same contents in the cache.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from foveate.engine.batch import Batch
from foveate.engine.cache.store import KVPages
from foveate.engine.models.base import Attention, Rotary
from foveate.kernels import attention, store
from foveate.kernels.attention import AttentionBatch
from foveate.kernels.decoder import MOST_ROWS, Cache, Layers, run_layers
from foveate.kernels.hardware.dispatch import version

Seen = tuple[Tensor, Tensor]  # queries [n, n_heads, d] and log-sum-exp [n, n_heads]


class AttentionBackend(Attention):
    """What all backends share: the prepared batch and the watched layer.

    Args:
        pages: the tensors of the cache.
        scale: multiplies the dot products.

    Attributes:
        seen: queries and log-sum-exp of the watched layer, after that layer ran; None before.
    """

    def __init__(self, pages: KVPages, scale: float) -> None:
        self._pages, self._scale = pages, scale
        self._watched = -1
        self.seen: Seen | None = None

    def prepare(self, batch: Batch, watched: int = -1) -> None:
        """Take the batch that the next layers attend over.

        Args:
            watched: a layer whose queries and log-sum-exp are wanted afterwards, or -1.
        """
        self._slots, self._ancestors = batch.slots, batch.ancestors
        self._batch = AttentionBatch(batch.queries, batch.lengths, batch.tables)
        self._watched, self.seen = watched, None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        store.store(*self._pages, k, v, self._slots[layer])
        out, lse = attention.paged_attention(
            q, *self._pages, self._batch, scale=self._scale, tree_mask=self._ancestors, layer=layer
        )
        return self._watch(layer, q, out, lse)

    def _watch(self, layer: int, q: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        if layer == self._watched:
            self.seen = q, lse
        return out

    def joins_layers(self, n_rows: int) -> bool:
        """Whether `run_layers` takes so many rows: then leaving rows out of the last layer saves nothing."""
        return False

    def capture(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return a function that repeats `step` on the batch's buffers; here `step` itself, since no graph is kept."""
        return step


class ReferenceBackend(AttentionBackend):
    """The definition, whatever other versions of the operations there are."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        store.reference(*self._pages, k, v, self._slots[layer])
        out, lse = attention.reference(q, *self._pages, self._batch, self._scale, self._ancestors, layer)
        return self._watch(layer, q, out, lse)


class CpuBackend(AttentionBackend):
    """The C++ kernels, with the bits of their operations one by one."""

    def joins_layers(self, n_rows: int) -> bool:
        return n_rows <= MOST_ROWS

    def run_layers(self, weights: Layers | None, rows: Tensor, rotary: Rotary, layers: range) -> Tensor | None:
        watches = self._watched in layers
        if weights is None or watches or self._ancestors is not None or not self.joins_layers(len(rows)):
            return None
        cache = Cache(*self._pages, self._batch, self._slots, self._scale)
        return run_layers(rows, rotary.cos, rotary.sin, weights, cache, layers)


class CudaBackend(AttentionBackend):
    """Torch operations on the GPU. The batch's tensors keep their addresses, so that `capture` can keep a graph."""


_BACKENDS: dict[str, type[AttentionBackend]] = {
    "reference": ReferenceBackend,
    "cpu": CpuBackend,
    "cuda": CudaBackend,
}


def attention_backend(pages: KVPages, device: torch.device, scale: float) -> AttentionBackend:
    """The backend for the device of the cache and the kernels there are."""
    return _BACKENDS[version(device)](pages, scale)
