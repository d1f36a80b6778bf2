"""Qwen2-VL: pictures of any size through full attention, LayerNorm and a plain MLP. Source: arXiv:2409.12191."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from foveate.engine.models.parts.layers import Activation, LayerNorm, Linear, activation
from foveate.engine.models.parts.qwen import QwenVL
from foveate.engine.models.parts.qwen_tower import QwenTower, QwenTowerConfig, QwenVisionAttention
from foveate.engine.models.parts.taps import Taps
from foveate.engine.section import Section

_NORM_EPS = 1e-6  # of the tower; not in any config


class Qwen2VL(QwenVL):
    family = "qwen2_vl"

    def tower(self, config: Section, device: torch.device) -> QwenTower:
        width, out_size = config.positive("embed_dim", 1280), config.positive("hidden_size", 3584)
        common = QwenTowerConfig.read(config, width, out_size)
        inner = int(width * config.number("mlp_ratio", 4))
        act = activation(config, "hidden_act", "quick_gelu")
        return QwenTower(
            common, device, block=lambda: _Block(common, inner, act), norm=lambda: LayerNorm(width, _NORM_EPS)
        )


FAMILY = Qwen2VL


class _Block(nn.Module):
    def __init__(self, config: QwenTowerConfig, mlp_width: int, act: Activation) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.width, _NORM_EPS)
        self.norm2 = LayerNorm(config.width, _NORM_EPS)
        self.attn = QwenVisionAttention(config)
        self.mlp = _Mlp(config.width, mlp_width, act)

    def forward(self, rows: Tensor, cos: Tensor, sin: Tensor, segments: Sequence[int], taps: Taps | None) -> Tensor:
        rows = rows + self.attn(self.norm1(rows), cos, sin, segments, taps)
        out: Tensor = rows + self.mlp(self.norm2(rows))
        return out


class _Mlp(nn.Module):
    def __init__(self, width: int, inner: int, act: Activation) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = Linear(width, inner), Linear(inner, width), act

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out
