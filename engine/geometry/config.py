"""The parts of config.json that describe a decoder or a vision tower, with every default filled in.

Published files leave most settings out; the defaults are those of the classes of `transformers`.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from foveate.engine.common import Grid, ModelError, Section, Tower

if TYPE_CHECKING:  # the kernels import torch
    from foveate.kernels.linear import Activation

_ACTIVATIONS: "dict[str, Activation]" = {
    "silu": "silu",
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def activation(config: Section, key: str, default: str) -> "Activation":
    """The activation a config names.

    Raises:
        ModelError: it is not one of ours; those there are are listed.
    """
    name = config.text(key, default)
    if name not in _ACTIVATIONS:
        raise ModelError(f"{config.where}: {key} {name!r} is not supported; there are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _require(config: Section, key: str, value: bool | int, legal: bool | int) -> None:
    """ModelError unless a setting has the only value we implement."""
    if value != legal:
        raise ModelError(f"{config.where}: {key} {value} is not supported, only {legal}")


def _require_silu(config: Section) -> None:
    name = config.text("hidden_act", "silu")
    if name != "silu":
        raise ModelError(f"{config.where}: hidden_act {name!r} is not supported, only silu")


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """How the frequencies of a decoder's rotation follow from its base."""

    theta: float = 10000.0
    factor: float = 1.0  # all frequencies are divided by it; with `llama3`, only the low ones
    llama3: tuple[float, float, float] | None = None  # low and high frequency factor, positions trained on; or none

    @classmethod
    def read(cls, config: Section, default_theta: float) -> "RopeConfig":
        """Read the rotary settings of a text config, under any of their spellings.

        Raises:
            ModelError: a scaling other than none, linear or llama3 (M-RoPE's "mrope" counts as none).
        """
        rope = _rope_section(config)
        kind = rope.text("rope_type", rope.text("type", "default"))
        if rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0)) != 1.0:
            raise ModelError(f"{rope.where}: partial_rotary_factor is not supported")
        theta = rope.number("rope_theta", config.number("rope_theta", default_theta))
        if kind in ("default", "mrope"):
            return cls(theta=theta)
        if kind == "linear":
            return cls(theta=theta, factor=rope.number("factor", 1.0))
        if kind == "llama3":
            low, high = rope.number("low_freq_factor", 1.0), rope.number("high_freq_factor", 4.0)
            most = config.integer("max_position_embeddings", 2048)
            trained = rope.number("original_max_position_embeddings", most)
            return cls(theta=theta, factor=rope.number("factor", 8.0), llama3=(low, high, trained))
        raise ModelError(f"{rope.where}: rope_type {kind!r} is not supported; there are default, mrope, linear, llama3")


def _rope_section(config: Section) -> Section:
    """The object with the rotary settings: `rope_scaling` as published, `rope_parameters` as written today."""
    return config.section("rope_scaling" if "rope_scaling" in config else "rope_parameters")


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """A text config."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: hidden_size / heads
    max_context: int = 2048
    norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    eos_ids: tuple[int, ...] = ()
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    mrope: tuple[int, ...] = ()  # frequencies per axis, summing to head_dim / 2; empty: plain RoPE

    @classmethod
    def read(cls, config: Section, defaults: "DecoderConfig") -> "DecoderConfig":
        """Read a text config over its type's defaults.

        Raises:
            ModelError: an activation, a window, head counts or a rotation that the decoder does not do.
        """
        _require_silu(config)
        _require(config, "use_sliding_window", config.flag("use_sliding_window", False), False)
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
            rope=RopeConfig.read(config, defaults.rope.theta),
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
    rope=RopeConfig(theta=1000000.0),
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
    sections = _rope_section(config).integers("mrope_section", (16, 24, 24))
    if len(sections) != 3 or sum(sections) != read.head_dim // 2:
        raise ModelError(f"{config.where}: mrope_section {sections} does not sum to half of head_dim {read.head_dim}")
    return replace(read, mrope=sections)


@dataclass(frozen=True, kw_only=True, slots=True)
class VitConfig:
    """The vision config of a CLIP or SigLIP tower: one square size, learned positions."""

    hidden_size: int
    intermediate_size: int
    n_layers: int  # in the checkpoint
    n_run: int  # layers that are run: the index of the selected hidden state
    n_heads: int
    image_size: int
    patch_size: int
    act: "Activation"
    norm_eps: float
    has_cls: bool  # CLIP: a class row, a norm before the layers, no patch bias; SigLIP: the opposite

    @classmethod
    def read(cls, config: Section, select: int) -> "VitConfig":
        """Read a `clip_vision_model` or `siglip_vision_model` config.

        Args:
            config: `vision_config`; wholly absent, it means LLaVA-1.5's tower.
            select: which hidden state is taken: 0 is the embedding, i the output of layer i - 1, negative from the end.

        Raises:
            ModelError: another tower, or a hidden state that no layer gives.
        """
        kind = config.text("model_type", "clip_vision_model")
        if kind not in ("clip_vision_model", "siglip_vision_model"):
            raise ModelError(f"{config.where}: model_type {kind!r} is not supported; there are CLIP and SigLIP towers")
        clip = kind == "clip_vision_model"
        absent = not config.keys()
        _require(config, "num_channels", config.integer("num_channels", 3), 3)
        n_layers = config.positive("num_hidden_layers", 24 if absent else 12)
        n_run = select if select >= 0 else n_layers + 1 + select
        if not 1 <= n_run <= n_layers:
            raise ModelError(f"{config.where}: vision_feature_layer {select} is no output of {n_layers} layers")
        return cls(
            hidden_size=config.positive("hidden_size", 1024 if absent else 768),
            intermediate_size=config.positive("intermediate_size", 4096 if absent else 3072),
            n_layers=n_layers,
            n_run=n_run,
            n_heads=config.positive("num_attention_heads", 16 if absent else 12),
            image_size=config.positive("image_size", 336 if absent else 224),
            patch_size=config.positive("patch_size", 14 if absent else 32 if clip else 16),
            act=activation(config, "hidden_act", "quick_gelu" if clip else "gelu_pytorch_tanh"),
            norm_eps=config.number("layer_norm_eps", 1e-5 if clip else 1e-6),
            has_cls=clip,
        )

    @property
    def side(self) -> int:
        """Patches along one edge."""
        return self.image_size // self.patch_size

    @property
    def grid(self) -> Grid:
        """Patches of a picture."""
        return Grid(self.side, self.side)

    @property
    def n_rows(self) -> int:
        """Rows per picture, the CLS row included."""
        return self.side * self.side + self.has_cls

    @property
    def tower(self) -> Tower:
        """What reducers may ask of it."""
        return Tower(has_cls=self.has_cls, depth=self.n_run)


@dataclass(frozen=True, kw_only=True, slots=True)
class QwenTowerConfig:
    """The vision config of Qwen2-VL or Qwen2.5-VL: pictures of any size, patches merged into cells."""

    width: int  # of the residual stream
    inner: int  # of a block's MLP
    out_size: int  # of a visual token: the decoder's hidden size
    depth: int
    n_heads: int
    patch_size: int
    merge: int
    n_frames: int  # temporal patch size: a picture stands for so many equal frames
    theta: float
    act: "Activation"
    window: int | None = None  # cells along the edge of a window; None: every block attends to the whole picture
    full_blocks: tuple[int, ...] | None = None  # those that do where there are windows, ascending

    @classmethod
    def read_qwen2_vl(cls, config: Section) -> "QwenTowerConfig":
        width, out_size = config.positive("embed_dim", 1280), config.positive("hidden_size", 3584)
        inner = int(width * config.number("mlp_ratio", 4))
        return cls._read(config, width, inner, out_size, activation(config, "hidden_act", "quick_gelu"))

    @classmethod
    def read_qwen2_5_vl(cls, config: Section) -> "QwenTowerConfig":
        width, out_size = config.positive("hidden_size", 3584), config.positive("out_hidden_size", 3584)
        _require_silu(config)
        read = cls._read(config, width, config.positive("intermediate_size", 3420), out_size, "silu")
        window = config.positive("window_size", 112)
        cells = window // read.merge // read.patch_size
        if cells < 1:
            raise ModelError(f"{config.where}: window_size {window} is less than one cell of merged patches")
        full = set(config.integers("fullatt_block_indexes", (7, 15, 23, 31)))
        return replace(read, window=cells, full_blocks=tuple(sorted(i for i in full if i < read.depth)))

    @classmethod
    def _read(cls, config: Section, width: int, inner: int, out_size: int, act: "Activation") -> "QwenTowerConfig":
        """Read the common part; the sizes have other names in each family."""
        _require(config, "in_channels", config.integer("in_channels", 3), 3)
        rope = config.section("rope_parameters")
        if rope.text("rope_type", "axial") not in ("axial", "default"):
            raise ModelError(f"{rope.where}: rope_type {rope.text('rope_type', '')!r} is not supported, only axial")
        return cls(
            width=width,
            inner=inner,
            out_size=out_size,
            depth=config.positive("depth", 32),
            n_heads=config.positive("num_heads", 16),
            patch_size=config.positive("patch_size", 14),
            merge=config.positive("spatial_merge_size", 2),
            n_frames=config.positive("temporal_patch_size", 2),
            theta=rope.number("rope_theta", 10000.0),
            act=act,
        )

    @property
    def cell(self) -> int:
        """Patches per visual token."""
        return self.merge * self.merge

    def grid(self, height: int, width: int) -> Grid:
        """Cells of a picture of that many pixels."""
        side = self.patch_size * self.merge
        return Grid(height // side, width // side)

    @property
    def tower(self) -> Tower:
        """What reducers may ask of it."""
        return Tower(has_cls=False, depth=self.depth, merges=True, full_layers=self.full_blocks)
