"""The Llama / Mistral / Qwen2 decoder: pre-norm, grouped-query attention, RoPE or M-RoPE, SwiGLU."""

import math
from functools import cached_property

import torch
from torch import Tensor, nn

from foveate.engine.geometry.config import DecoderConfig, RopeConfig
from foveate.engine.models.parts.attention import Attention, Rotary
from foveate.engine.models.parts.layers import Embedding, FusedLinear, GatedLinear, Linear, RMSNorm, frequencies
from foveate.kernels.cpu.weights import PackedWeight
from foveate.kernels.decoder import Layers, LayerWeights, Product
from foveate.kernels.rotary import rotate


class Decoder(nn.Module):
    """Token embedding, layers and final norm. Parameter names are `transformers`' own."""

    def __init__(self, config: DecoderConfig, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.hidden_size, config.vocab_size)
        self.layers = nn.ModuleList(_Layer(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        # Plain tensors, not buffers: they are exact in float32 whatever the dtype of the model.
        self.frequencies = _frequencies(config.rope, config.head_dim, device)
        axes = [axis for axis, n in enumerate(config.mrope) for _ in range(n)] or [0] * (config.head_dim // 2)
        self.axes = torch.tensor(axes, device=device)  # [head_dim / 2], the position axis each frequency turns by

    def rotary(self, positions: Tensor) -> Rotary:
        """As `Model.rotary`."""
        at = positions.to(self.axes.device)[self.axes].T.contiguous()  # [n, head_dim / 2], as kernels read angles
        angles = at.float() * self.frequencies
        return Rotary(angles.cos(), angles.sin())

    def run(
        self, rows: Tensor, rotary: Rotary, attention: Attention, layers: range, wanted: Tensor | None = None
    ) -> Tensor:
        """As `Model.run`: in one call where the attention offers one, else layer by layer."""
        if wanted is not None:
            (last,) = layers
            some: Tensor = self.layers[last](rows, rotary, attention, wanted)
            return some
        joined = attention.run_layers(self.packed, rows, rotary, layers)
        if joined is not None:
            return joined
        for i in layers:
            rows = self.layers[i](rows, rotary, attention)
        return rows

    @cached_property
    def packed(self) -> Layers | None:
        """The layers' weights where the CPU's kernels hold them; None elsewhere. Asked for once they are filled."""
        layers = [layer.packed() for layer in self.layers if isinstance(layer, _Layer)]
        whole = [layer for layer in layers if layer is not None]
        config = self.config
        if len(whole) < config.n_layers:
            return None
        return Layers(whole, config.n_heads, config.n_kv_heads, config.head_dim, config.norm_eps)

    def project(self, layer: int, rows: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """As `Model.project`."""
        block = self.layers[layer]
        assert isinstance(block, _Layer), "the decoder is made of these"
        q, k, _ = block.self_attn.project(block.input_layernorm(rows), rotary)
        return q, k


class _Layer(nn.Module):
    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.self_attn = _Attention(config, index)
        self.mlp = _Mlp(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, rows: Tensor, rotary: Rotary, attention: Attention, wanted: Tensor | None = None) -> Tensor:
        rows = self.self_attn(self.input_layernorm(rows), rotary, attention, rows, wanted)
        out: Tensor = self.mlp(self.post_attention_layernorm(rows), rows)
        return out

    def packed(self) -> LayerWeights | None:
        """Its weights; None where a matrix is a plain tensor."""
        matrices = (self.self_attn.qkv_proj, self.self_attn.o_proj, self.mlp.gate_up_proj, self.mlp.down_proj)
        products = [Product(m.weight, m.bias) for m in matrices if isinstance(m.weight, PackedWeight)]
        if len(products) < len(matrices):
            return None
        qkv, out, gate_up, down = products
        return LayerWeights(self.input_layernorm.weight, qkv, out, self.post_attention_layernorm.weight, gate_up, down)


class _Attention(nn.Module):
    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        wide, narrow = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        parts = {"q_proj": wide, "k_proj": narrow, "v_proj": narrow}
        self.qkv_proj = FusedLinear(config.hidden_size, parts, config.qkv_bias)
        self.o_proj = Linear(wide, config.hidden_size, bias=config.out_bias)

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [n, heads, d] of normed rows."""
        heads = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        n_turned = self.n_heads + self.n_kv_heads
        turned = rotate(heads[:, :n_turned], rotary.cos, rotary.sin)  # queries and keys in one go
        q, k = torch.split(turned, [self.n_heads, self.n_kv_heads], dim=1)
        return q, k, heads[:, n_turned:]

    def forward(
        self, x: Tensor, rotary: Rotary, attention: Attention, residual: Tensor, wanted: Tensor | None
    ) -> Tensor:
        q, k, v = self.project(x, rotary)
        if wanted is not None:
            q, residual = q[wanted], residual[wanted]
        out: Tensor = self.o_proj(attention.attend(self.index, q, k, v).flatten(1), residual=residual)
        return out


class _Mlp(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_up_proj = GatedLinear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.gate_up_proj(x), residual=residual)
        return out


def _frequencies(rope: RopeConfig, dim: int, device: torch.device) -> Tensor:
    """[dim / 2] float32."""
    table = frequencies(rope.theta, dim, device)
    if rope.llama3 is None:
        return table / rope.factor
    low, high, trained = rope.llama3
    # Long wavelengths are slowed by `factor`, short ones kept, those between interpolated (Llama 3.1's rule).
    wavelength = 2 * math.pi / table
    blend = ((trained / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * table / rope.factor + blend * table
