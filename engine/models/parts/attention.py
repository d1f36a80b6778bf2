"""What a decoder's layers are given beside their rows: the attention over the cache, and the rotation."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from foveate.kernels.decoder import Layers


class Attention(ABC):
    """Attention of one batch over the paged cache, as a decoder calls it."""

    @abstractmethod
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store keys and values of all rows, and attend.

        Args:
            q: [m, n_heads, d]; m is n, or fewer where only some rows are wanted.
            k, v: [n, n_kv_heads, d]; keys are rotated already.

        Returns:
            [m, n_heads, d].
        """

    def run_layers(self, weights: Layers | None, rows: Tensor, rotary: "Rotary", layers: range) -> Tensor | None:
        """Run consecutive layers as one call, with the bits of the layers one by one.

        Args:
            weights: of all layers, where kernels hold them; None elsewhere.

        Returns:
            [n, hidden_size]; None if this attention needs a call of `attend` for each layer.
        """
        return None


class Rotary(NamedTuple):
    """Rotation of packed rows, float32 [n, head_dim / 2] each."""

    cos: Tensor
    sin: Tensor

    def take(self, rows: Tensor) -> "Rotary":
        """Of some of the rows, [m] int64."""
        return Rotary(self.cos[rows], self.sin[rows])
