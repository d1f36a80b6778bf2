"""LLaVA-1.5: a CLIP or SigLIP tower, a two-layer projector, a Llama or Qwen2 decoder; positions are plain counting.

Not here: LLaVA-NeXT's tiles (model_type llava_next) and projectors over several hidden states.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from foveate.engine.errors import ModelError
from foveate.engine.grid import Grid
from foveate.engine.models.parts.decoder import DecoderConfig, read_llama, read_qwen2
from foveate.engine.models.parts.family import Family, Source
from foveate.engine.models.parts.layers import activation
from foveate.engine.models.parts.matrix import Linear
from foveate.engine.models.parts.pixels import normalise
from foveate.engine.models.parts.taps import Taps
from foveate.engine.models.parts.vit import Vit, VitConfig
from foveate.engine.preprocess import ImageProcessor
from foveate.engine.reduce.inputs import VisualInputs
from foveate.engine.reduce.signals import CELLS, ENC, Signal
from foveate.engine.section import Section

_DECODERS = {"llama": read_llama, "qwen2": read_qwen2}
_LAYER = re.compile(r"vision_tower\.encoder\.layers\.(\d+)\.")
_UNUSED = ("vision_tower.post_layernorm.", "vision_tower.head.")


class Llava(Family):
    """Visual tokens are the patches of one square picture, `full` strategy on CLIP: its CLS row before them."""

    def __init__(self, source: Source) -> None:
        config = source.config
        super().__init__(source, _read_decoder(config.section("text_config")))
        tower = VitConfig.read(config.section("vision_config"), _select_layer(config))
        _check_size(config, tower, source.processor)
        self.n_skipped = _n_skipped(config)
        self.vision_tower = Vit(tower)
        hidden_size = self.language_model.config.hidden_size
        self.multi_modal_projector = _Projector(config, tower.hidden_size, hidden_size)
        image_token_id = config.integer("image_token_index", config.integer("image_token_id", 32000))
        self.spec = self._spec("llava", source, image_token_id, tower.tower)

    def rename(self, name: str) -> str | None:
        name = name.removeprefix("model.")
        name = name.replace("vision_tower.vision_model.", "vision_tower.", 1)
        name = name.replace("language_model.lm_head.", "lm_head.", 1).replace(
            "language_model.model.", "language_model.", 1
        )
        config = self.vision_tower.config
        layer = _LAYER.match(name)
        past_selected = layer is not None and config.n_run <= int(layer[1]) < config.n_layers
        return None if past_selected or name.startswith(_UNUSED) else name

    def grid(self, height: int, width: int) -> Grid:
        config = self.vision_tower.config
        n = config.n_rows - self.n_skipped
        return Grid(config.side, config.side) if n == config.side**2 else Grid(1, n)

    def n_patches(self, height: int, width: int) -> int:
        return self.vision_tower.config.n_rows

    def encode(self, images: Sequence[Tensor], signals: frozenset[Signal]) -> list[VisualInputs]:
        hidden, taps = self.vision_tower([normalise(image, self.processor) for image in images], signals)
        return [self._inputs(i, rows, taps) for i, rows in enumerate(hidden)]

    def _inputs(self, i: int, rows: Tensor, taps: Taps) -> VisualInputs:
        start, end = taps.bounds[i] + self.n_skipped, taps.bounds[i + 1]
        kept = rows[self.n_skipped :]
        enc, cells = ENC in taps.wanted, CELLS in taps.wanted
        own = kept.clone() if enc or cells else None  # a view would keep the whole batch alive in the feature cache
        return VisualInputs(
            grid=self.grid(0, 0),
            proj=self.multi_modal_projector(kept),
            enc=own if enc else None,
            cls=rows[0].clone() if enc and taps.has_cls else None,
            cells=own if cells else None,
            project=self.multi_modal_projector if enc or cells else None,
            tower=self.spec.tower,
            taps={s: _of_picture(s, t, start, end, self.n_skipped) for s, t in taps.found.items()},
        )

    def lay_out(self, segments: Sequence[int | Grid]) -> tuple[list[Tensor], int]:
        positions, start = [], 0
        for segment in segments:
            end = start + (segment.n_tokens if isinstance(segment, Grid) else segment)
            positions.append(torch.arange(start, end)[None])
            start = end
        return positions, start


FAMILY = Llava


def _of_picture(signal: Signal, values: Tensor, start: int, end: int, n_skipped: int) -> Tensor:
    """One picture's part of a packed signal; `qk` keeps the CLS row before it, and has one patch per token."""
    if signal.kind == "qk":
        return values[start - n_skipped : end, None].permute(2, 0, 1, 3, 4).contiguous()
    return values[start:end].clone()


class _Projector(nn.Module):
    def __init__(self, config: Section, n_in: int, n_out: int) -> None:
        super().__init__()
        bias = config.flag("multimodal_projector_bias", True)
        self.linear_1 = Linear(n_in, n_out, bias=bias)
        self.linear_2 = Linear(n_out, n_out, bias=bias)
        self.act = activation(config, "projector_hidden_act", "gelu")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(self.linear_1(x, self.act))
        return out


def _read_decoder(text: Section) -> DecoderConfig:
    kind = text.text("model_type", "llama")
    if kind not in _DECODERS:
        raise ModelError(f"{text.where}: model_type {kind!r} is not supported; there are {', '.join(_DECODERS)}")
    return _DECODERS[kind](text)


def _select_layer(config: Section) -> int:
    layers = config.integers("vision_feature_layer", (-2,))
    if len(layers) != 1:
        raise ModelError(f"{config.where}: vision_feature_layer {list(layers)}: only one layer is supported")
    return layers[0]


def _n_skipped(config: Section) -> int:
    strategy = config.text("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise ModelError(f"{config.where}: vision_feature_select_strategy {strategy!r} is not 'default' or 'full'")
    return int(strategy == "default")  # drops row 0: CLIP's CLS row; on SigLIP, oddly, the first patch


def _check_size(config: Section, tower: VitConfig, processor: ImageProcessor) -> None:
    side = tower.image_size
    if processor.prepared_size(side, side) != (side, side) or processor.rule == "smart":
        raise ModelError(
            f"{config.where}: the tower reads {side} x {side} pixels, but the image processor makes others"
        )
