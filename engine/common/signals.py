"""What a reducer may read of the vision tower and of the request, asked for before the tower runs.

A signal is a kind and, where the kind has layers, a layer: an index (int, negative from the end) or a share of the
depth (float: 0.0 the first layer run, 1.0 the last). The tower resolves it to an index, and the feature cache keys on
the resolved signals, so methods that read the same thing share one recording.

Layers are those that are run: -1 is the layer whose output the projector reads (LLaVA-1.5's layer index 22 of 24).
"""

from dataclasses import dataclass
from typing import Literal

from foveate.configs.errors import ConfigError

Kind = Literal[
    "saliency", "cls_row", "cls_cat", "recv", "logits", "keys", "keys_cat", "values", "cls_values", "qk", "hidden",
    "enc", "cells", "pixels", "question", "caption",
]  # fmt: skip
LayerRef = int | float  # int: index, negative from the end; float: share of the depth, 0 to 1
_WITHOUT_LAYER = {"enc", "cells", "pixels", "question", "caption"}
_ATTENTION = {"saliency", "cls_row", "cls_cat", "recv", "logits", "qk"}
_OF_CLS = {"cls_row", "cls_cat", "cls_values"}
OF_REQUEST = frozenset({"pixels", "question", "caption"})  # not the tower's: added to its features per request


@dataclass(frozen=True, slots=True)
class Signal:
    """One thing to record; made by the functions below."""

    kind: Kind
    layer: LayerRef = -1

    def __str__(self) -> str:
        return self.kind if self.kind in _WITHOUT_LAYER else f"{self.kind}({self.layer})"


def saliency(layer: LayerRef = -1) -> Signal:
    """[M] float32: `cls_row` where the tower has a CLS row, else `recv`. Compare ranks, never values across towers."""
    return Signal("saliency", layer)


def cls_row(layer: LayerRef = -1) -> Signal:
    """[M] float32: softmax attention of CLS to each patch, mean over heads, not renormalised. Towers with CLS only."""
    return Signal("cls_row", layer)


def cls_cat(layer: LayerRef = -1) -> Signal:
    """[M] float32: as `cls_row`, but one softmax over the heads' concatenated queries and keys (scale C^-1/2)."""
    return Signal("cls_cat", layer)


def recv(layer: LayerRef = -1) -> Signal:
    """[M] float32: attention received, mean over all queries (CLS too) and heads. Costs one pass over all pairs."""
    return Signal("recv", layer)


def logits(layer: LayerRef = -1) -> Signal:
    """[M] float32: attention before the softmax, mean over heads: scaled products of CLS's query and each key.

    In towers without a CLS row: the logarithm of attention received, which ranks as `recv` does. (The products of a
    mean query rank otherwise, and keep the wrong tokens.)
    """
    return Signal("logits", layer)


def keys(layer: LayerRef = -1) -> Signal:
    """[M, d] float32: key projection before rotation, mean over heads."""
    return Signal("keys", layer)


def keys_cat(layer: LayerRef = -1) -> Signal:
    """[M, heads * d] float32: key projection before rotation, heads side by side."""
    return Signal("keys_cat", layer)


def values(layer: LayerRef = -1) -> Signal:
    """[M, heads, d] float32: value projection."""
    return Signal("values", layer)


def cls_values(layer: LayerRef = -1) -> Signal:
    """[M, heads] float32: product of each value with CLS's value, less the product of CLS's value with itself.

    So the softmax over CLS and tokens is the softmax of these numbers and a 0. Towers with CLS only.
    """
    return Signal("cls_values", layer)


def qk(layer: LayerRef = -1) -> Signal:
    """Queries and keys as attention sees them, for `VisualInputs.rows` and `full`: 8 * M * C bytes, so ask seldom.

    A picture in tiles has none, and who reads it there gets an ImageError.
    """
    return Signal("qk", layer)


def hidden(layer: LayerRef = -1) -> Signal:
    """[M, C] float32: a layer's output rows; towers that merge patches: the mean over a token's patches."""
    return Signal("hidden", layer)


ENC = Signal("enc")  # rows before the projector and CLS's own; nothing in towers that merge patches
CELLS = Signal("cells")  # what the projector reads: `enc`, or the patches of a token side by side before the merger
PIXELS = Signal("pixels")  # uint8 [H, W, 3], the prepared picture
QUESTION = Signal("question")  # [L, D] rows of the user's question
CAPTION = Signal("caption")  # [L, D] rows of the text that goes with this picture


@dataclass(frozen=True, kw_only=True, slots=True)
class Tower:
    """What a vision tower can be asked for; resolves signals.

    Layers that attend in windows see only their window: attention signals of such a layer are read from the nearest
    layer with full attention instead (the deeper of two).
    """

    has_cls: bool
    depth: int  # layers run
    merges: bool = False  # patches become one token before the projector is done: no `enc`
    full_layers: tuple[int, ...] | None = None  # those with full attention, ascending; None: all

    def layer(self, layer: LayerRef) -> int:
        """The index of a layer. Raises ConfigError: there is no such layer."""
        if isinstance(layer, float):
            if not 0.0 <= layer <= 1.0:
                raise ConfigError(f"layer {layer} is no share of the depth; a share is from 0.0 to 1.0")
            return round(layer * (self.depth - 1))
        if not -self.depth <= layer < self.depth:
            raise ConfigError(
                f"layer {layer}: this vision tower runs {self.depth} layers; use {-self.depth} to {self.depth - 1}"
            )
        return layer % self.depth

    def resolve(self, signal: Signal) -> Signal:
        """The signal as the tower records it: an index for a layer, what stands for `saliency`, `logits`.

        Raises:
            ConfigError: a layer that is not run, or the CLS row of a tower that has none.
        """
        if signal.kind in _WITHOUT_LAYER:
            return signal
        layer = self.layer(signal.layer)
        kind = signal.kind
        if kind == "saliency":
            kind = "cls_row" if self.has_cls else "recv"
        if kind == "logits" and not self.has_cls:
            kind = "recv"  # of which `VisualInputs.logits` takes the logarithm
        if kind in _OF_CLS and not self.has_cls:
            raise ConfigError("this vision tower has no CLS row; choose a method that does without one")
        if kind in _ATTENTION and self.full_layers:
            layer = min(self.full_layers, key=lambda full: (abs(full - layer), -full))
        return Signal(kind, layer)
