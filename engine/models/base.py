"""What the engine asks of a model family. A family is one file beside this one."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from foveate.engine.common import Signal, Size
from foveate.engine.geometry.base import Geometry, ModelSpec
from foveate.engine.models.parts.attention import Attention, Rotary
from foveate.engine.vision import TowerCut, VisualInputs

__all__ = ["Attention", "Model", "Rotary"]


class Model(nn.Module, ABC):
    """A vision tower, a projector and a decoder. Stateless: the KV cache lives behind `Attention`."""

    geometry: Geometry
    dtype: torch.dtype  # of the KV cache; of activations too, unless the CPU's kernels keep those in float32
    weights: str  # how the decoder's matrices are held: "fp32", "bf16", "int16", "int8", "int4"
    n_parameters: int

    @abstractmethod
    def encode(
        self, images: Sequence[Tensor], signals: frozenset[Signal], originals: Sequence[Size | None] | None = None
    ) -> list[VisualInputs]:
        """Run the tower and projector on several images in one packed batch.

        Args:
            images: uint8 [height, width, 3] each, of prepared sizes; rescaled and normalised here.
            signals: what to tap besides `proj`, resolved by `spec.tower`; none of a request. No [heads, N, N] buffer
                is ever built.
            originals: of each image, as for `Geometry.grid`; None: none was cut into tiles.
        """

    def encode_cut(self, image: Tensor, signals: frozenset[Signal], cut: TowerCut) -> VisualInputs:
        """Run the tower and projector on one image without the cells and rows that `cut` drops.

        The image is uint8 [height, width, 3]. Called only where `geometry.can_cut` is true.

        Returns:
            the cells that are left, told by `places`, and the signals that were tapped.
        """
        raise AssertionError("a model that can cut its tower says how")

    @abstractmethod
    def embed(self, token_ids: Tensor) -> Tensor:
        """[n] int64 -> [n, hidden_size]."""

    @abstractmethod
    def rotary(self, positions: Tensor) -> Rotary:
        """[n_pos_axes, n] int64 -> the rotation of each row."""

    @abstractmethod
    def run(
        self, rows: Tensor, rotary: Rotary, attention: Attention, layers: range, wanted: Tensor | None = None
    ) -> Tensor:
        """Run consecutive layers of the decoder over packed rows of several sequences.

        Args:
            rows: [n, hidden_size], input embeddings or what the layer before gave.
            rotary: of these rows.
            wanted: [m] int64, of one layer, the rows that are asked for; the others only leave their keys and values,
                and attention gets the queries of these alone. None: all.

        Returns:
            [n, hidden_size], or [m, hidden_size].
        """

    @abstractmethod
    def project(self, layer: int, rows: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Rotated queries [n, n_heads, d] and keys [n, n_kv_heads, d] that a layer makes of its input rows."""

    @abstractmethod
    def logits(self, rows: Tensor) -> Tensor:
        """[m, hidden_size] from the last layer -> [m, vocab_size] float32; the final norm is part of it."""

    @property
    def spec(self) -> ModelSpec:
        return self.geometry.spec

    def forward(self, rows: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Run all layers."""
        return self.run(rows, self.rotary(positions), attention, range(self.spec.n_layers))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
