"""Small pieces: norms, activations, rotary tables."""

import math

import torch
from torch import Tensor, nn

from foveate.engine.common.errors import ModelError
from foveate.engine.common.section import Section
from foveate.kernels.layer_norm import layer_norm
from foveate.kernels.linear import Activation
from foveate.kernels.rms_norm import rms_norm

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def activation(config: Section, key: str, default: str) -> Activation:
    """The activation a config names.

    Raises:
        ModelError: it is not one of ours; those there are are listed.
    """
    name = config.text(key, default)
    if name not in _ACTIVATIONS:
        raise ModelError(f"{config.where}: {key} {name!r} is not supported; there are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def require(config: Section, key: str, value: bool | int, legal: bool | int) -> None:
    """ModelError unless a setting has the only value we implement."""
    if value != legal:
        raise ModelError(f"{config.where}: {key} {value} is not supported, only {legal}")


class Conv2d(nn.Conv2d):
    """Without its random start: every weight comes from a checkpoint."""

    def reset_parameters(self) -> None: ...


class Table(nn.Module):
    """Rows that are added as they are, such as learned positions."""

    def __init__(self, n: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, size))


class LayerNorm(nn.Module):
    """Scale rows to mean 0 and variance 1, then by a weight and a bias."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(size)), nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Scale rows to a mean square of one. Statistics in float32 whatever the dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def frequencies(theta: float, dim: int, device: torch.device) -> Tensor:
    """[dim / 2] float32 rotary frequencies theta^(-2i/dim)."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))


def rope_frequencies(config: Section, dim: int, default_theta: float, device: torch.device) -> Tensor:
    """[dim / 2] float32 frequencies of a decoder, under any of the config's spellings.

    Raises:
        ModelError: a scaling other than none, linear or llama3 (M-RoPE's "mrope" counts as none).
    """
    rope = rope_section(config)
    kind = rope.text("rope_type", rope.text("type", "default"))
    if rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError(f"{rope.where}: partial_rotary_factor is not supported")
    table = frequencies(rope.number("rope_theta", config.number("rope_theta", default_theta)), dim, device)
    if kind in ("default", "mrope"):
        return table
    if kind == "linear":
        return table / rope.number("factor", 1.0)
    if kind == "llama3":
        return _llama3(table, rope, config.integer("max_position_embeddings", 2048))
    raise ModelError(f"{rope.where}: rope_type {kind!r} is not supported; there are default, mrope, linear, llama3")


def rope_section(config: Section) -> Section:
    """The object with the rotary settings: `rope_scaling` as published, `rope_parameters` as written today."""
    return config.section("rope_scaling" if "rope_scaling" in config else "rope_parameters")


def _llama3(table: Tensor, rope: Section, max_positions: int) -> Tensor:
    """Long wavelengths are slowed by `factor`, short ones kept, those between interpolated (Llama 3.1's rule)."""
    factor = rope.number("factor", 8.0)
    low, high = rope.number("low_freq_factor", 1.0), rope.number("high_freq_factor", 4.0)
    trained = rope.number("original_max_position_embeddings", max_positions)
    wavelength = 2 * math.pi / table
    blend = ((trained / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * table / factor + blend * table
