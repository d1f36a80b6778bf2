"""Qwen2-VL: pictures of any size through full attention, LayerNorm and a plain MLP; M-RoPE. Source: arXiv:2409.12191.

The tower's merger writes decoder rows directly: one visual token per cell of merged patches.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from foveate.engine.common import CELLS, Signal, Size
from foveate.engine.geometry.qwen2_vl import Qwen2VLGeometry
from foveate.engine.models.family import Family
from foveate.engine.models.parts.layers import LayerNorm, Linear
from foveate.engine.models.parts.qwen_tower import QwenTower
from foveate.engine.models.parts.tower import normalise
from foveate.engine.vision import TowerCut, VisualInputs
from foveate.kernels.linear import Activation

NORM_EPS = 1e-6  # of the tower; not in any config


class Qwen2VL(Family):
    geometry: Qwen2VLGeometry

    def __init__(self, geometry: Qwen2VLGeometry, device: torch.device) -> None:
        super().__init__(geometry, device)
        self.visual = self._tower(device)

    def _tower(self, device: torch.device) -> QwenTower:
        config = self.geometry.tower
        return QwenTower(
            config,
            device,
            mlp=lambda: _Mlp(config.width, config.inner, config.act),
            norm=lambda: LayerNorm(config.width, NORM_EPS),
        )

    def rename(self, name: str) -> str | None:
        if name.startswith(("visual.", "language_model.", "lm_head.")):
            return name
        rest = name.removeprefix("model.")
        return rest if rest.startswith(("visual.", "language_model.")) else f"language_model.{rest}"

    def encode(
        self, images: Sequence[Tensor], signals: frozenset[Signal], originals: Sequence[Size | None] | None = None
    ) -> list[VisualInputs]:
        merged, taps = self.visual([normalise(image, self.processor) for image in images], signals)
        return [
            self._inputs(image, merged[start:end], {s: t[start:end] for s, t in taps.found.items()})
            for image, start, end in zip(images, taps.bounds[:-1], taps.bounds[1:], strict=True)
        ]

    def encode_cut(self, image: Tensor, signals: frozenset[Signal], cut: TowerCut) -> VisualInputs:
        merged, cutting = self.visual.run_cut(normalise(image, self.processor), signals, cut)
        return cutting.placed(self._inputs(image, merged, cutting.taps.found))

    def _inputs(self, image: Tensor, merged: Tensor, found: Mapping[Signal, Tensor]) -> VisualInputs:
        """One picture of a batch; copies, since views would keep the whole batch alive in the feature cache."""
        return VisualInputs(
            grid=self.geometry.grid(image.shape[0], image.shape[1]),
            proj=merged.clone(),
            tower=self.spec.tower,
            taps={s: _of_picture(s, t) for s, t in found.items() if s != CELLS},
            cells=found[CELLS].clone() if CELLS in found else None,
            project=self.visual.project if CELLS in found else None,
        )


FAMILY = Qwen2VL


class _Mlp(nn.Module):
    def __init__(self, width: int, inner: int, act: Activation) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = Linear(width, inner), Linear(inner, width), act

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(x, self.act), residual=residual)
        return out


def _of_picture(signal: Signal, values: Tensor) -> Tensor:
    """A copy; of `qk`, queries and keys apart: [2, tokens, patches, heads, d]."""
    return values.movedim(2, 0).contiguous() if signal.kind == "qk" else values.clone()
