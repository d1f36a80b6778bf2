"""LLaVA-OneVision: LLaVA-NeXT's tiles on SigLIP, more of them, their cells scaled down where they are too many.

Several pictures in one request are read whole, each padded to a square, with one newline after each, as the model was
trained (`ImageProcessor.tiles_several`). Not here: videos. Source: Li et al., 2024, arXiv:2408.03326.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from foveate.engine.images.anyres import Tiling
from foveate.engine.models.llava_next import LlavaNext
from foveate.engine.vision import VisualInputs


class LlavaOnevision(LlavaNext):
    """Where cells are scaled down there are no rows before the projector, and signals are scaled like the rows."""

    def _scaled(self, inputs: VisualInputs, tiling: Tiling) -> VisualInputs:
        taps = {s: values if s.kind == "qk" else _scale(values, tiling) for s, values in inputs.taps.items()}
        return replace(inputs, proj=_scale(inputs.proj, tiling), taps=taps, enc=None, cells=None, project=None)


FAMILY = LlavaOnevision


def _scale(values: Tensor, tiling: Tiling) -> Tensor:
    """[n_cells, ...] of the thumbnail and the crops; the crops scaled down bilinearly."""
    n_thumbnail = tiling.side**2
    crops = values[n_thumbnail:].reshape(1, tiling.rows, tiling.cols, -1).permute(0, 3, 1, 2)
    scaled = interpolate(crops, (tiling.out_rows, tiling.out_cols), mode="bilinear")
    flat = scaled.permute(0, 2, 3, 1).reshape(-1, *values.shape[1:])
    return torch.cat([values[:n_thumbnail], flat])
