"""Qwen2.5-VL: most tower blocks attend within windows, some over the whole picture; RMSNorm and SwiGLU.

Source: arXiv:2502.13923.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from foveate.engine.common import Grid
from foveate.engine.geometry.qwen2_5_vl import Qwen25VLGeometry
from foveate.engine.models.parts.layers import GatedLinear, Linear, RMSNorm
from foveate.engine.models.parts.qwen_tower import QwenTower, TowerLayout
from foveate.engine.models.qwen2_vl import NORM_EPS, Qwen2VL


class Qwen25VL(Qwen2VL):
    geometry: Qwen25VLGeometry

    def _tower(self, device: torch.device) -> QwenTower:
        config = self.geometry.tower
        return Qwen25VLTower(
            config,
            device,
            mlp=lambda: _Mlp(config.width, config.inner),
            norm=lambda: RMSNorm(config.width, NORM_EPS),
        )


FAMILY = Qwen25VL


class Qwen25VLTower(QwenTower):
    """Cells are permuted so that a window's rows lie together; the whole picture stays together too."""

    def segments(self, block: int, plan: TowerLayout) -> list[int]:
        return plan.pictures if block in (self.config.full_blocks or ()) else plan.windows

    def plan(self, grids: Sequence[Grid]) -> TowerLayout:
        order, sizes, first = [], [], 0
        window = self.config.window
        assert window is not None, "this tower attends in windows"
        for grid in grids:
            cells = torch.arange(grid.n_tokens).view(grid.rows, grid.cols) + first
            # Windows in raster order; those at the right and bottom edge are cut off, never padded.
            bands = torch.split(cells, window)
            windows = [w.flatten() for band in bands for w in torch.split(band, window, dim=1)]
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
