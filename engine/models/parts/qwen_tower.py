"""What the vision towers of Qwen2-VL and Qwen2.5-VL share: packed pictures of any size, axial RoPE, a 2 x 2 merger.

Patches come cell by cell (the merge x merge patches that become one visual token are neighbours), cells in raster
order; a tower that attends in windows permutes whole cells, and what leaves it is in raster order again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.engine.common import CELLS, Grid, Signal
from foveate.engine.geometry.config import QwenTowerConfig
from foveate.engine.models.parts.layers import Linear, frequencies
from foveate.engine.models.parts.tower import Cutting, Laid, LayerTaps, Taps, attend, patches
from foveate.engine.vision import TowerCut
from foveate.kernels.rotary import rotate

AxialRotary = tuple[Tensor, Tensor]  # cos and sin, [n, head_dim / 2] float32 each, of the axial angles


@dataclass(frozen=True, slots=True)
class TowerLayout:
    """How the rows of one batch are ordered and attend. Rows come in cells; `order` permutes cells."""

    pictures: list[int]  # [n_images + 1] row bounds
    windows: list[int]  # [n_windows + 1] row bounds after the permutation; the pictures where there are no windows
    order: Tensor | None  # [n_cells] int64: cell at each place; None: raster


class QwenTower(nn.Module):
    """Patch embedding, blocks and merger; in raster order and with full attention unless a subclass says otherwise.

    Args:
        mlp: makes one block's, which adds its residual itself.
        norm: makes one norm over the residual stream, of a block or of the merger.
    """

    def __init__(
        self,
        config: QwenTowerConfig,
        device: torch.device,
        mlp: Callable[[], nn.Module],
        norm: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.ModuleDict({"proj": _PatchWeight(config)})
        self.frequencies = frequencies(config.theta, config.width // config.n_heads // 2, device)
        self.blocks = nn.ModuleList(_Block(config, norm, mlp) for _ in range(config.depth))
        self.merger = _Merger(config, norm())

    def plan(self, grids: Sequence[Grid]) -> TowerLayout:
        """Rows in raster order of cells, every picture attending within itself."""
        bounds = list(accumulate((g.n_tokens * self.config.cell for g in grids), initial=0))
        return TowerLayout(bounds, bounds, None)

    def segments(self, block: int, plan: TowerLayout) -> list[int]:
        """What attends to what in a block."""
        return plan.pictures

    def forward(self, images: Sequence[Tensor], wanted: frozenset[Signal]) -> tuple[Tensor, Taps]:
        """Run normalised float32 [height, width, 3] pictures in one packed batch.

        Returns:
            [n_cells, out_size] in raster order, packed, and the taps of each cell: the mean over its patches; those of
            CELLS stand side by side, those of `qk` apart.
        """
        grids = [self.config.grid(image.shape[0], image.shape[1]) for image in images]
        plan = self.plan(grids)
        rows = self._reorder(self._embed(images), plan)
        angles = self._reorder(torch.cat([self._angles(g) for g in grids]), plan)
        rotary = (angles.cos(), angles.sin())
        taps = Taps(wanted, plan.pictures, has_cls=False)
        for i, block in enumerate(self.blocks):
            rows = block(rows, rotary, self.segments(i, plan), taps.at(i))
            taps.record_rows(i, rows)
        if CELLS in wanted:
            taps.found[CELLS] = rows.clone()
        merged = self.merger(rows)
        self._merge_taps(taps, plan)
        return (merged if plan.order is None else _scatter(merged, plan.order)), taps

    def run_cut(self, image: Tensor, wanted: frozenset[Signal], cut: TowerCut) -> tuple[Tensor, Cutting]:
        """Run one picture and cut whole cells of it before and between the blocks; windows keep what is left of them.

        Returns:
            [n_left, out_size] in raster order, and what became of the cells; taps as `forward` gives them.
        """
        grid, cell = self.config.grid(image.shape[0], image.shape[1]), self.config.cell
        plan = self.plan([grid])
        order = torch.arange(grid.n_tokens) if plan.order is None else plan.order.cpu()
        window = torch.arange(len(plan.windows) - 1).repeat_interleave(torch.tensor(plan.windows).diff() // cell)
        if cut.cells is not None:
            left = torch.isin(order, cut.cells)
            order, window = order[left], window[left]
        rows = self._embed([image]).unflatten(0, (-1, cell))[order].flatten(0, 1)  # type: ignore[no-untyped-call]
        angles = self._angles(grid).unflatten(0, (-1, cell))[order]  # type: ignore[no-untyped-call]
        laid = Laid(order, (angles.cos(), angles.sin(), window), patches=cell)
        cutting = Cutting(cut, wanted, self.config.tower, grid, laid)
        for i, block in enumerate(self.blocks):
            cos, sin, window = cutting.attached
            inner = torch.unique_consecutive(window, return_counts=True)[1] * cell
            bounds = TowerLayout(list(cutting.taps.bounds), [0, *inner.cumsum(0).tolist()], None)
            rotary = (cos.flatten(0, 1), sin.flatten(0, 1))
            rows = block(rows, rotary, self.segments(i, bounds), cutting.taps.at(i), cutting.log_size)
            cutting.taps.record_rows(i, rows)
            rows = cutting.after(i, rows)
        taps, raster = cutting.finish(), cutting.cells.argsort()
        if CELLS in wanted:
            taps.found[CELLS] = rows.clone()
        taps.found = {signal: self._of_cells(signal, values)[raster] for signal, values in taps.found.items()}
        return self.merger(rows)[raster], cutting

    def project(self, cells: Tensor) -> Tensor:
        """CELLS rows [r, cell * width] -> [r, out_size]."""
        rows: Tensor = self.merger(cells.view(-1, self.config.width))
        return rows

    def _embed(self, images: Sequence[Tensor]) -> Tensor:
        weight = self.patch_embed["proj"].weight
        assert isinstance(weight, Tensor)
        # All frames of a picture are the same, so the frames' weights are summed instead of the frame repeated.
        folded = weight.float().sum(2).flatten(1).to(weight.dtype)
        cut = torch.cat([patches(image, self.config.patch_size, self.config.merge) for image in images])
        return functional.linear(cut.to(weight.dtype), folded)

    def _angles(self, grid: Grid) -> Tensor:
        """float32 [n_patches, head_dim / 2]: the row turns the first half of the frequencies, the column the second."""
        merge, device = self.config.merge, self.frequencies.device
        y = torch.arange(grid.rows * merge, device=device)[:, None].expand(-1, grid.cols * merge)
        x = torch.arange(grid.cols * merge, device=device)[None].expand(grid.rows * merge, -1)
        y, x = (p.reshape(grid.rows, merge, grid.cols, merge).transpose(1, 2).flatten() for p in (y, x))
        return torch.cat([p[:, None].float() * self.frequencies for p in (y, x)], dim=1)

    def _reorder(self, rows: Tensor, plan: TowerLayout) -> Tensor:
        if plan.order is None:
            return rows
        return rows.reshape(-1, self.config.cell, rows.shape[1])[plan.order].flatten(0, 1)

    def _merge_taps(self, taps: Taps, plan: TowerLayout) -> None:
        taps.bounds = [bound // self.config.cell for bound in plan.pictures]
        for signal, values in taps.found.items():
            cells = self._of_cells(signal, values)
            taps.found[signal] = cells if plan.order is None else _scatter(cells, plan.order)

    def _of_cells(self, signal: Signal, values: Tensor) -> Tensor:
        """From one row per patch to one per cell."""
        cells: Tensor = values.unflatten(0, (-1, self.config.cell))  # type: ignore[no-untyped-call]
        if signal == CELLS:
            return cells.flatten(1)
        return cells if signal.kind == "qk" else cells.mean(1)


def _scatter(rows: Tensor, order: Tensor) -> Tensor:
    """Undo `rows = raster[order]`."""
    out = torch.empty_like(rows)
    out[order] = rows
    return out


class QwenVisionAttention(nn.Module):
    """Bidirectional attention with axial RoPE; the checkpoint already holds q, k and v in one product."""

    def __init__(self, config: QwenTowerConfig) -> None:
        super().__init__()
        self.n_heads, self.scale = config.n_heads, (config.width // config.n_heads) ** -0.5
        self.qkv = Linear(config.width, 3 * config.width)
        self.proj = Linear(config.width, config.width)

    def forward(
        self,
        x: Tensor,
        rotary: AxialRotary,
        segments: Sequence[int],
        taps: LayerTaps | None,
        residual: Tensor,
        log_size: Tensor | None,
    ) -> Tensor:
        heads = self.qkv(x).view(x.shape[0], 3 * self.n_heads, -1)
        v = heads[:, 2 * self.n_heads :]
        if taps is not None:
            taps.record_projections(heads[:, self.n_heads : 2 * self.n_heads], v)
        q, k = torch.split(rotate(heads[:, : 2 * self.n_heads], *rotary), self.n_heads, dim=1)
        if taps is not None:
            taps.record_attention(q, k, segments, self.scale)
        out: Tensor = self.proj(attend(q, k, v, segments, self.scale, log_size).flatten(1), residual=residual)
        return out


class _Block(nn.Module):
    def __init__(self, config: QwenTowerConfig, norm: Callable[[], nn.Module], mlp: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(), norm()
        self.attn, self.mlp = QwenVisionAttention(config), mlp()

    def forward(
        self,
        rows: Tensor,
        rotary: AxialRotary,
        segments: Sequence[int],
        taps: LayerTaps | None,
        log_size: Tensor | None = None,
    ) -> Tensor:
        rows = self.attn(self.norm1(rows), rotary, segments, taps, rows, log_size)
        out: Tensor = self.mlp(self.norm2(rows), rows)
        return out


class _PatchWeight(nn.Module):
    """A bias-free convolution over [frames, height, width], multiplied as a matrix by its owner."""

    def __init__(self, config: QwenTowerConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.weight = nn.Parameter(torch.empty(config.width, 3, config.n_frames, size, size))


class _Merger(nn.Module):
    """The patches of a cell, side by side, through two layers to one visual token."""

    def __init__(self, config: QwenTowerConfig, norm: nn.Module) -> None:
        super().__init__()
        wide = config.width * config.cell
        self.ln_q = norm
        self.wide = wide
        self.mlp = nn.ModuleDict({"0": Linear(wide, wide), "2": Linear(wide, config.out_size)})  # as in the checkpoint

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.mlp["0"](self.ln_q(rows).view(-1, self.wide), "gelu")
        out: Tensor = self.mlp["2"](hidden)
        return out
