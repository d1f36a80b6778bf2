"""The geometry of LLaVA-1.5: the patches of one square picture; positions count."""

from collections.abc import Sequence
from typing import ClassVar

from foveate.engine.common import Grid, ImageError, ModelError, Section, Size
from foveate.engine.geometry.base import Checkpoint, CheckpointGeometry, Positions
from foveate.engine.geometry.config import (
    DecoderConfig,
    VitConfig,
    activation,
    read_llama,
    read_mistral,
    read_qwen2,
)
from foveate.engine.images.preprocess import ImageProcessor

_DECODERS = {"llama": read_llama, "mistral": read_mistral, "qwen2": read_qwen2}


class LlavaGeometry(CheckpointGeometry):
    """`full` strategy on CLIP: its CLS row is a visual token before the patches."""

    # What the class of `transformers` takes where the config says nothing.
    family: ClassVar[str] = "llava"
    text_type: ClassVar[str] = "llama"
    select_layer: ClassVar[int] = -2
    strategy: ClassVar[str] = "default"
    image_token: ClassVar[int] = 32000

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = checkpoint.config
        decoder = _read_decoder(config.section("text_config"), self.text_type)
        self.tower = VitConfig.read(config.section("vision_config"), _select_layer(config, self.select_layer))
        _check_size(config, self.tower, checkpoint.processor)
        self.n_skipped = _n_skipped(config, self.strategy)
        self.can_cut = self.tower.n_rows - self.n_skipped == self.tower.side**2  # a cell is a patch
        self.projector_bias = config.flag("multimodal_projector_bias", True)
        self.projector_act = activation(config, "projector_hidden_act", "gelu")
        image_token_id = config.integer("image_token_index", config.integer("image_token_id", self.image_token))
        super().__init__(checkpoint, decoder, image_token_id, self.tower.tower)

    def grid(self, height: int, width: int, original: Size | None = None) -> Grid:
        tower = self.tower
        if original is not None or (height, width) != (tower.image_size, tower.image_size):
            raise ImageError(f"a picture of {height} x {width} pixels, tiles or not, is not what the tower reads")
        n = tower.n_rows - self.n_skipped
        return tower.grid if n == tower.side**2 else Grid(1, n)

    def n_patches(self, height: int, width: int) -> int:
        return self.tower.n_rows

    def lay_out(self, segments: Sequence[int | Grid]) -> tuple[list[Positions], int]:
        positions: list[Positions] = []
        start = 0
        for segment in segments:
            end = start + (segment.n_tokens if isinstance(segment, Grid) else segment)
            positions.append((range(start, end),))
            start = end
        return positions, start


FAMILY = LlavaGeometry


def _read_decoder(text: Section, default: str) -> DecoderConfig:
    kind = text.text("model_type", default)
    if kind not in _DECODERS:
        raise ModelError(f"{text.where}: model_type {kind!r} is not supported; there are {', '.join(_DECODERS)}")
    return _DECODERS[kind](text)


def _select_layer(config: Section, default: int) -> int:
    layers = config.integers("vision_feature_layer", (default,))
    if len(layers) != 1:
        raise ModelError(f"{config.where}: vision_feature_layer {list(layers)}: only one layer is supported")
    return layers[0]


def _n_skipped(config: Section, default: str) -> int:
    strategy = config.text("vision_feature_select_strategy", default)
    if strategy not in ("default", "full"):
        raise ModelError(f"{config.where}: vision_feature_select_strategy {strategy!r} is not 'default' or 'full'")
    return int(strategy == "default")  # drops row 0: CLIP's CLS row; on SigLIP, oddly, the first patch


def _check_size(config: Section, tower: VitConfig, processor: ImageProcessor) -> None:
    side = tower.image_size
    if processor.prepared_size(side, side) != (side, side) or processor.rule == "smart":
        raise ModelError(
            f"{config.where}: the tower reads {side} x {side} pixels, but the image processor makes others"
        )
