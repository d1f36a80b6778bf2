"""Qwen2-VL: pictures of any size through full attention, LayerNorm and a plain MLP. Source: arXiv:2409.12191."""

import torch
from torch import Tensor, nn

from foveate.engine.common.section import Section
from foveate.engine.models.parts.layers import LayerNorm, activation
from foveate.engine.models.parts.matrix import Linear
from foveate.engine.models.parts.qwen import QwenVL
from foveate.engine.models.parts.qwen_tower import QwenTower, QwenTowerConfig
from foveate.kernels.linear import Activation

_NORM_EPS = 1e-6  # of the tower; not in any config


class Qwen2VL(QwenVL):
    family = "qwen2_vl"

    def tower(self, config: Section, device: torch.device) -> QwenTower:
        width, out_size = config.positive("embed_dim", 1280), config.positive("hidden_size", 3584)
        common = QwenTowerConfig.read(config, width, out_size)
        inner = int(width * config.number("mlp_ratio", 4))
        act = activation(config, "hidden_act", "quick_gelu")
        return QwenTower(common, device, mlp=lambda: _Mlp(width, inner, act), norm=lambda: LayerNorm(width, _NORM_EPS))


FAMILY = Qwen2VL


class _Mlp(nn.Module):
    def __init__(self, width: int, inner: int, act: Activation) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = Linear(width, inner), Linear(inner, width), act

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(x, self.act), residual=residual)
        return out
