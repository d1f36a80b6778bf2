"""Qwen2.5-VL: most tower blocks attend within windows, some over the whole picture; RMSNorm and SwiGLU.

Source: arXiv:2502.13923.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from foveate.engine.common.errors import ModelError
from foveate.engine.common.grid import Grid
from foveate.engine.common.section import Section
from foveate.engine.models.parts.layers import RMSNorm, activation
from foveate.engine.models.parts.matrix import GatedLinear, Linear
from foveate.engine.models.parts.qwen import QwenVL
from foveate.engine.models.parts.qwen_tower import QwenTower, QwenTowerConfig, TowerLayout

_NORM_EPS = 1e-6  # of the tower; not in any config


class Qwen25VL(QwenVL):
    family = "qwen2_5_vl"

    def tower(self, config: Section, device: torch.device) -> "Qwen25VLTower":
        return Qwen25VLTower(config, device)


FAMILY = Qwen25VL


class Qwen25VLTower(QwenTower):
    """Cells are permuted so that a window's rows lie together; the whole picture stays together too."""

    def __init__(self, config: Section, device: torch.device) -> None:
        width, out_size = config.positive("hidden_size", 3584), config.positive("out_hidden_size", 3584)
        common = QwenTowerConfig.read(config, width, out_size)
        inner = config.positive("intermediate_size", 3420)
        if activation(config, "hidden_act", "silu") != "silu":
            raise ModelError(
                f"{config.where}: hidden_act {config.text('hidden_act', '')!r} is not supported, only silu"
            )
        super().__init__(common, device, mlp=lambda: _Mlp(width, inner), norm=lambda: RMSNorm(width, _NORM_EPS))
        self._full = frozenset(config.integers("fullatt_block_indexes", (7, 15, 23, 31)))
        window = config.positive("window_size", 112)
        self.window = window // common.merge // common.patch_size  # cells along an edge
        if self.window < 1:
            raise ModelError(f"{config.where}: window_size {window} is less than one cell of merged patches")

    @property
    def full_blocks(self) -> tuple[int, ...]:
        return tuple(sorted(i for i in self._full if i < self.config.depth))

    def segments(self, block: int, plan: TowerLayout) -> list[int]:
        return plan.pictures if block in self._full else plan.windows

    def plan(self, grids: Sequence[Grid]) -> TowerLayout:
        order, sizes, first = [], [], 0
        for grid in grids:
            cells = torch.arange(grid.n_tokens).view(grid.rows, grid.cols) + first
            # Windows in raster order; those at the right and bottom edge are cut off, never padded.
            bands = torch.split(cells, self.window)
            windows = [w.flatten() for band in bands for w in torch.split(band, self.window, dim=1)]
            order += windows
            sizes += [w.shape[0] * self.config.cell for w in windows]
            first += grid.n_tokens
        pictures = super().plan(grids).pictures
        return TowerLayout(pictures, list(accumulate(sizes, initial=0)), torch.cat(order).to(self.frequencies.device))


class _Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = GatedLinear(width, inner, bias=True), Linear(inner, width)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.gate_up_proj(x), residual=residual)
        return out
