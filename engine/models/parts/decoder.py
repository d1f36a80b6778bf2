"""The Llama / Mistral / Qwen2 decoder: pre-norm, grouped-query attention, RoPE or M-RoPE, SwiGLU."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from foveate.engine.common.errors import ModelError
from foveate.engine.common.section import Section
from foveate.engine.models.base import Attention, Rotary
from foveate.engine.models.parts.layers import RMSNorm, require, rope_frequencies, rope_section
from foveate.engine.models.parts.matrix import Embedding, FusedLinear, GatedLinear, Linear
from foveate.kernels.cpu.weights import PackedWeight
from foveate.kernels.decoder import Layers, LayerWeights, Product
from foveate.kernels.rotary import rotate


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """A text config with every default filled in: published files leave most of them out."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: hidden_size / heads
    max_context: int = 2048
    norm_eps: float = 1e-6
    theta: float = 10000.0
    eos_ids: tuple[int, ...] = ()
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    mrope: tuple[int, ...] = ()  # frequencies per axis, summing to head_dim / 2; empty: plain RoPE

    @classmethod
    def read(cls, config: Section, defaults: "DecoderConfig") -> "DecoderConfig":
        """Read a text config over its type's defaults.

        Raises:
            ModelError: an activation, a window or head counts that the decoder does not do.
        """
        if config.text("hidden_act", "silu") != "silu":
            raise ModelError(
                f"{config.where}: hidden_act {config.text('hidden_act', '')!r} is not supported, only silu"
            )
        require(config, "use_sliding_window", config.flag("use_sliding_window", False), False)
        n_heads = config.positive("num_attention_heads", defaults.n_heads)
        hidden = config.positive("hidden_size", defaults.hidden_size)
        # An explicit null means "as many as heads"; an absent key means the type's own default.
        n_kv_heads = 0 if config.is_null("num_key_value_heads") else defaults.n_kv_heads
        n_kv_heads = config.positive("num_key_value_heads", n_kv_heads or n_heads)
        if n_heads % n_kv_heads:
            raise ModelError(f"{config.where}: num_key_value_heads {n_kv_heads} does not divide {n_heads} heads")
        return replace(
            defaults,
            vocab_size=config.positive("vocab_size", defaults.vocab_size),
            hidden_size=hidden,
            intermediate_size=config.positive("intermediate_size", defaults.intermediate_size),
            n_layers=config.positive("num_hidden_layers", defaults.n_layers),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=config.positive("head_dim", hidden // n_heads),
            max_context=config.positive("max_position_embeddings", defaults.max_context),
            norm_eps=config.number("rms_norm_eps", defaults.norm_eps),
            eos_ids=config.integers("eos_token_id", defaults.eos_ids),
        )


LLAMA = DecoderConfig(eos_ids=(2,))
MISTRAL = DecoderConfig(intermediate_size=14336, n_kv_heads=8, max_context=131072, eos_ids=(2,))
QWEN2 = DecoderConfig(vocab_size=151936, intermediate_size=22016, n_kv_heads=32, max_context=32768, qkv_bias=True)
QWEN2_VL = DecoderConfig(
    vocab_size=152064,
    hidden_size=8192,
    intermediate_size=29568,
    n_layers=80,
    n_heads=64,
    n_kv_heads=8,
    max_context=32768,
    norm_eps=1e-5,
    theta=1000000.0,
    eos_ids=(151645,),
    qkv_bias=True,
)


def read_llama(config: Section) -> DecoderConfig:
    """A `llama` text config."""
    attention_bias = config.flag("attention_bias", False)
    read = DecoderConfig.read(config, LLAMA)
    return replace(read, qkv_bias=attention_bias, out_bias=attention_bias, mlp_bias=config.flag("mlp_bias", False))


def read_mistral(config: Section) -> DecoderConfig:
    """A `mistral` text config whose window, if it has one, is no narrower than its context."""
    read = DecoderConfig.read(config, MISTRAL)
    window = read.max_context if config.is_null("sliding_window") else config.positive("sliding_window", 4096)
    if window < read.max_context:
        raise ModelError(f"{config.where}: sliding_window {window} is not supported; attention reaches everything")
    return read


def read_qwen2(config: Section) -> DecoderConfig:
    """A `qwen2` text config."""
    return DecoderConfig.read(config, QWEN2)


def read_qwen2_vl(config: Section) -> DecoderConfig:
    """The text config of Qwen2-VL or Qwen2.5-VL."""
    read = DecoderConfig.read(config, QWEN2_VL)
    sections = rope_section(config).integers("mrope_section", (16, 24, 24))
    if len(sections) != 3 or sum(sections) != read.head_dim // 2:
        raise ModelError(f"{config.where}: mrope_section {sections} does not sum to half of head_dim {read.head_dim}")
    return replace(read, mrope=sections)


class Decoder(nn.Module):
    """Token embedding, layers and final norm. Parameter names are `transformers`' own."""

    def __init__(self, config: DecoderConfig, rope: Section, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.hidden_size, config.vocab_size)
        self.layers = nn.ModuleList(_Layer(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        # Plain tensors, not buffers: they are exact in float32 whatever the dtype of the model.
        self.frequencies = rope_frequencies(rope, config.head_dim, config.theta, device)
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
