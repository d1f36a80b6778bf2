"""What the engine asks of a model family. A family is one file beside this one that subclasses `Model`."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from foveate.engine.common.grid import Grid
from foveate.engine.images.anyres import Size
from foveate.engine.vision.cut import TowerCut
from foveate.engine.vision.inputs import VisualInputs
from foveate.engine.vision.signals import Signal, Tower
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


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What the engine must know to plan for a model, none of it a tensor."""

    family: str  # the file's name: "llava", "qwen2_vl"
    n_layers: int  # of the decoder
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_context: int
    image_token_id: int
    eos_ids: tuple[int, ...]  # from generation_config.json, else config.json
    n_pos_axes: int  # 1: RoPE, 3: M-RoPE
    tower: Tower  # what reducers may ask of the vision tower


class Model(nn.Module, ABC):
    """A vision tower, a projector and a decoder. Stateless: the KV cache lives behind `Attention`."""

    spec: ModelSpec
    dtype: torch.dtype  # of the KV cache; of activations too, unless the CPU's kernels keep those in float32
    weights: str  # how the decoder's matrices are held: "fp32", "bf16", "int16", "int8", "int4"
    n_parameters: int
    can_cut: bool = False  # whether `encode_cut` is there, for pictures of one tile without newlines

    @abstractmethod
    def grid(self, height: int, width: int, original: Size | None = None) -> Grid:
        """Visual tokens of an image, newlines included. Pure arithmetic.

        Args:
            height, width: its *prepared* size in pixels; of tiles, one above the other, together.
            original: (height, width) before it was cut into tiles; None if it was not.

        Raises:
            ImageError: no such picture comes from the image processor, or none of it would be seen.
        """

    @abstractmethod
    def n_patches(self, height: int, width: int) -> int:
        """Rows the tower reads for that image: the unit of the encode budget."""

    @abstractmethod
    def encode(
        self, images: Sequence[Tensor], signals: frozenset[Signal], originals: Sequence[Size | None] | None = None
    ) -> list[VisualInputs]:
        """Run the tower and projector on several images in one packed batch.

        Args:
            images: uint8 [height, width, 3] each, of prepared sizes; rescaled and normalised here.
            signals: what to tap besides `proj`, resolved by `spec.tower`; none of a request. No [heads, N, N] buffer
                is ever built.
            originals: of each image, as for `grid`; None: none was cut into tiles.
        """

    def encode_cut(self, image: Tensor, signals: frozenset[Signal], cut: TowerCut) -> VisualInputs:
        """Run the tower and projector on one image, uint8 [height, width, 3], and leave out what `cut` says.

        Returns:
            the cells that are left, told by `places`, and the signals that were tapped.
        """
        raise AssertionError("a model that can cut its tower says how")

    @abstractmethod
    def lay_out(self, segments: Sequence[int | Grid]) -> tuple[list[Tensor], int]:
        """Positions of a prompt given as runs of text (a count) and images (a grid), unpruned.

        Returns:
            one int64 [n_pos_axes, n] tensor per segment, and the position of the next (generated) token, which text
            continues from on every axis.
        """

    @abstractmethod
    def embed(self, token_ids: Tensor) -> Tensor:
        """[n] int64 -> [n, hidden_size]."""

    @abstractmethod
    def rotary(self, positions: Tensor) -> Rotary:
        """[n_pos_axes, n] int64 -> how far each row is rotated."""

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
        """Queries [n, n_heads, d] and keys [n, n_kv_heads, d], rotated, that a layer makes of the rows entering it."""

    @abstractmethod
    def logits(self, rows: Tensor) -> Tensor:
        """[m, hidden_size] from the last layer -> [m, vocab_size] float32; the final norm is part of it."""

    def forward(self, rows: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """All layers."""
        return self.run(rows, self.rotary(positions), attention, range(self.spec.n_layers))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
