"""The CLIP and SigLIP vision towers: one square size, learned positions, pre-norm layers.

Only the layers up to the selected hidden state are built and run: what comes after it (and CLIP's last norm, SigLIP's
pooling head) never reaches the language model.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.engine.common import Signal
from foveate.engine.geometry.config import VitConfig
from foveate.engine.models.parts.layers import Conv2d, FusedLinear, LayerNorm, Linear, Table
from foveate.engine.models.parts.tower import Cutting, Laid, LayerTaps, Taps, attend, patches
from foveate.engine.vision import TowerCut


class Vit(nn.Module):
    """The tower up to the selected hidden state. Parameter names are `transformers`' own."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        self.pre_layrnorm = LayerNorm(config.hidden_size, config.norm_eps) if config.has_cls else nn.Identity()
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(_Layer(config) for _ in range(config.n_run))})

    def forward(self, images: Sequence[Tensor], wanted: frozenset[Signal]) -> tuple[Tensor, Taps]:
        """Run normalised float32 [size, size, 3] pictures in one batch.

        Returns:
            [n_images, n_rows, hidden_size], the CLS row first, and what was tapped on the way.
        """
        n = len(images)
        rows = self.pre_layrnorm(torch.cat([self.embeddings(image) for image in images]))
        bounds = list(accumulate([self.config.n_rows] * n, initial=0))
        taps = Taps(wanted, bounds, self.config.has_cls)
        for i, layer in enumerate(self._layers):
            rows = layer(rows, bounds, taps.at(i))
            taps.record_rows(i, rows)
        return rows.view(n, self.config.n_rows, -1), taps

    def run_cut(self, image: Tensor, wanted: frozenset[Signal], cut: TowerCut) -> tuple[Tensor, Cutting]:
        """Run one picture, a cell a patch, and cut it before and between the layers.

        Returns:
            [n_left, hidden_size], the CLS row first, and what became of the cells.
        """
        side, lead = self.config.side, int(self.config.has_cls)
        cells = torch.arange(side * side) if cut.cells is None else cut.cells
        rows = self.embeddings(image)
        if cut.cells is not None:
            rows = rows[torch.cat([torch.arange(lead), lead + cells])]
        rows = self.pre_layrnorm(rows)
        cutting = Cutting(cut, wanted, self.config.tower, self.config.grid, Laid(cells, lead=lead))
        for i, layer in enumerate(self._layers):
            rows = layer(rows, cutting.taps.bounds, cutting.taps.at(i), cutting.log_size)
            cutting.taps.record_rows(i, rows)
            rows = cutting.after(i, rows)
        cutting.finish()
        return rows, cutting

    @property
    def _layers(self) -> nn.ModuleList:
        layers = self.encoder["layers"]
        assert isinstance(layers, nn.ModuleList)
        return layers


class _Embeddings(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.patch_embedding = Conv2d(3, config.hidden_size, size, size, bias=not config.has_cls)
        self.position_embedding = Table(config.n_rows, config.hidden_size)
        if config.has_cls:
            self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.has_cls = config.has_cls

    def forward(self, image: Tensor) -> Tensor:
        weight = self.patch_embedding.weight
        cut = patches(image, weight.shape[-1]).to(weight.dtype)
        rows = functional.linear(cut, weight.flatten(1), self.patch_embedding.bias)
        if self.has_cls:
            rows = torch.cat([self.class_embedding[None], rows])
        return rows + self.position_embedding.weight


class _Layer(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, config.norm_eps)
        self.self_attn = _Attention(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = _Mlp(config)

    def forward(
        self, rows: Tensor, bounds: Sequence[int], taps: LayerTaps | None, log_size: Tensor | None = None
    ) -> Tensor:
        rows = self.self_attn(self.layer_norm1(rows), bounds, taps, rows, log_size)
        out: Tensor = self.mlp(self.layer_norm2(rows), rows)
        return out


class _Attention(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        n = config.hidden_size
        self.n_heads, self.scale = config.n_heads, (n // config.n_heads) ** -0.5
        self.qkv_proj = FusedLinear(n, {"q_proj": n, "k_proj": n, "v_proj": n}, bias=True)
        self.out_proj = Linear(n, n)

    def forward(
        self, x: Tensor, bounds: Sequence[int], taps: LayerTaps | None, residual: Tensor, log_size: Tensor | None
    ) -> Tensor:
        q, k, v = self.qkv_proj(x).view(x.shape[0], 3, self.n_heads, -1).unbind(1)
        if taps is not None:
            taps.record_projections(k, v)
            taps.record_attention(q, k, bounds, self.scale)
        attended = attend(q, k, v, bounds, self.scale, log_size)
        out: Tensor = self.out_proj(attended.flatten(1), residual=residual)
        return out


class _Mlp(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)
        self.act = config.act

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(x, self.act), residual=residual)
        return out
