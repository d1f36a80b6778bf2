"""A run of consecutive decoder layers over the rows of a step.

A layer is RMSNorm, queries, keys and values in one product, rotation, the store into the paged cache, attention over
it, the output product with its residual, RMSNorm, silu(gate) * up, and the product down with its residual.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from foveate.kernels.attention import AttentionBatch, paged_attention
from foveate.kernels.cpu.weights import FORMS, PackedWeight
from foveate.kernels.hardware.dispatch import choose
from foveate.kernels.linear import linear
from foveate.kernels.rms_norm import rms_norm
from foveate.kernels.rotary import rotate
from foveate.kernels.store import store

MOST_ROWS = 64  # that the CPU version runs in one call


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix and its bias, float32 [n]."""

    weight: PackedWeight
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The weights of one layer; norms are float32 [hidden]."""

    attention_norm: Tensor
    qkv: Product  # queries, then keys, then values
    out: Product
    mlp_norm: Tensor
    gate_up: Product  # gated
    down: Product

    @property
    def products(self) -> tuple[Product, Product, Product, Product]:
        return self.qkv, self.out, self.gate_up, self.down


@dataclass(frozen=True)
class Layers:
    """All layers of a decoder, of one shape."""

    layers: Sequence[LayerWeights]
    n_heads: int
    n_kv_heads: int
    head_dim: int
    eps: float  # of the norms

    def __post_init__(self) -> None:
        heads, hidden = self.n_heads * self.head_dim, len(self.layers[0].attention_norm)
        wide = heads + 2 * self.n_kv_heads * self.head_dim
        for layer in self.layers:
            inner = layer.gate_up.weight.n // 2
            shapes = [(product.weight.n, product.weight.k) for product in layer.products]
            assert shapes == [(wide, hidden), (hidden, heads), (2 * inner, hidden), (hidden, inner)], (
                "one layer's shape"
            )
            assert inner == self.layers[0].gate_up.weight.n // 2, "layers share one room for what is between products"
            assert layer.gate_up.weight.gated, "the first product of the MLP ends in a gate"
            values = (layer.attention_norm, layer.mlp_norm, *(product.bias for product in layer.products))
            assert all(v is None or (v.dtype == torch.float32 and v.is_contiguous()) for v in values), "in float32"

    @cached_property
    def words(self) -> Tensor:
        """int64 [n_layers, 30]: each row a Layer of kernels/cpu/decoder.h."""
        return torch.tensor([_layer_words(layer) for layer in self.layers], dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class Cache:
    """Where the rows of a step put their keys and values, and what they attend to."""

    keys: Tensor  # [n_pages, block_tokens, n_kv_heads, d], the pages of all layers
    values: Tensor  # the same
    batch: AttentionBatch  # tables of all layers
    slots: Tensor  # int64 [n_layers, n_rows], as `store` reads them
    scale: float  # multiplies the dot products


def run_layers(rows: Tensor, cos: Tensor, sin: Tensor, layers: Layers, cache: Cache, which: range) -> Tensor:
    """Run the layers `which` of the decoder, which follow one another.

    Args:
        rows: float32 [n_rows, hidden], what enters the first of them.
        cos, sin: float32 [n_rows, d / 2] of the rows' angles.

    Returns:
        float32 [n_rows, hidden], what leaves the last.
    """
    assert which.step == 1 and 0 <= which.start <= which.stop <= len(layers.layers), (
        "consecutive layers of those there are"
    )
    return choose(reference, rows.device, rows.dtype, cache.keys.dtype)(rows, cos, sin, layers, cache, which)


def reference(rows: Tensor, cos: Tensor, sin: Tensor, layers: Layers, cache: Cache, which: range) -> Tensor:
    """The definition: operation by operation."""
    heads = [layers.n_heads, layers.n_kv_heads, layers.n_kv_heads]
    for i in which:
        layer = layers.layers[i]
        normed = rms_norm(rows, layer.attention_norm, layers.eps)
        qkv = linear(normed, layer.qkv.weight, layer.qkv.bias)
        q, k, v = torch.split(qkv.view(len(rows), -1, layers.head_dim), heads, dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        store(cache.keys, cache.values, k, v, cache.slots[i])
        attended, _ = paged_attention(q, cache.keys, cache.values, cache.batch, scale=cache.scale, layer=i)
        rows = linear(attended.flatten(1), layer.out.weight, layer.out.bias, residual=rows)
        normed = rms_norm(rows, layer.mlp_norm, layers.eps)
        gated = linear(normed, layer.gate_up.weight, layer.gate_up.bias, activation="silu_gate")
        rows = linear(gated, layer.down.weight, layer.down.bias, residual=rows)
    return rows


def _layer_words(layer: LayerWeights) -> list[int]:
    words = [layer.attention_norm.data_ptr(), layer.mlp_norm.data_ptr()]
    for product in layer.products:
        weight, scales, bias = product.weight, product.weight.scales, product.bias
        words += [
            weight.data.data_ptr(),
            0 if scales is None else scales.data_ptr(),
            0 if bias is None else bias.data_ptr(),
        ]
        words += [FORMS.index(weight.form), weight.round_inputs, weight.n, weight.k]
    return words
