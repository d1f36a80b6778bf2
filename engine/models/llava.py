"""LLaVA-1.5: a CLIP or SigLIP tower, a two-layer projector, a Llama, Mistral or Qwen2 decoder; positions count.

Not here: projectors over several hidden states.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from foveate.engine.common.errors import ImageError, ModelError
from foveate.engine.common.grid import Grid
from foveate.engine.common.section import Section
from foveate.engine.images.anyres import Size
from foveate.engine.images.preprocess import ImageProcessor
from foveate.engine.models.parts.decoder import DecoderConfig, read_llama, read_mistral, read_qwen2
from foveate.engine.models.parts.family import Family, Source
from foveate.engine.models.parts.layers import activation
from foveate.engine.models.parts.matrix import Linear
from foveate.engine.models.parts.pixels import normalise
from foveate.engine.models.parts.taps import Taps
from foveate.engine.models.parts.vit import Vit, VitConfig
from foveate.engine.vision.cut import TowerCut
from foveate.engine.vision.inputs import VisualInputs
from foveate.engine.vision.signals import CELLS, ENC, Signal

_DECODERS = {"llama": read_llama, "mistral": read_mistral, "qwen2": read_qwen2}
_LAYER = re.compile(r"vision_tower\.encoder\.layers\.(\d+)\.")
_UNUSED = ("vision_tower.post_layernorm.", "vision_tower.head.")


class Llava(Family):
    """Visual tokens are the patches of one square picture, `full` strategy on CLIP: its CLS row before them."""

    # What the class of `transformers` takes where the config says nothing.
    family = "llava"
    decoder = "llama"
    select_layer = -2
    strategy = "default"
    image_token = 32000

    def __init__(self, source: Source) -> None:
        config = source.config
        super().__init__(source, _read_decoder(config.section("text_config"), self.decoder))
        tower = VitConfig.read(config.section("vision_config"), _select_layer(config, self.select_layer))
        _check_size(config, tower, source.processor)
        self.n_skipped = _n_skipped(config, self.strategy)
        self.vision_tower = Vit(tower)
        self.can_cut = tower.n_rows - self.n_skipped == tower.side**2  # a cell is a patch
        hidden_size = self.language_model.config.hidden_size
        self.multi_modal_projector = _Projector(config, tower.hidden_size, hidden_size)
        image_token_id = config.integer("image_token_index", config.integer("image_token_id", self.image_token))
        self.spec = self._spec(self.family, source, image_token_id, tower.tower)

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

    def grid(self, height: int, width: int, original: Size | None = None) -> Grid:
        config = self.vision_tower.config
        if original is not None or (height, width) != (config.image_size, config.image_size):
            raise ImageError(f"a picture of {height} x {width} pixels, tiles or not, is not what the tower reads")
        n = config.n_rows - self.n_skipped
        return Grid(config.side, config.side) if n == config.side**2 else Grid(1, n)

    def n_patches(self, height: int, width: int) -> int:
        return self.vision_tower.config.n_rows

    def encode(
        self, images: Sequence[Tensor], signals: frozenset[Signal], originals: Sequence[Size | None] | None = None
    ) -> list[VisualInputs]:
        hidden, taps = self.vision_tower([normalise(image, self.processor) for image in images], signals)
        config = self.vision_tower.config
        grid, cells = self.grid(config.image_size, config.image_size), torch.arange(self.n_skipped, config.n_rows)
        return [self._inputs(grid, start, start + cells, hidden, taps) for start in taps.bounds[:-1]]

    def encode_cut(self, image: Tensor, signals: frozenset[Signal], cut: TowerCut) -> VisualInputs:
        rows, cutting = self.vision_tower.run_cut(normalise(image, self.processor), signals, cut)
        grid, cells = self.grid(image.shape[0], image.shape[1]), torch.arange(self.n_skipped, len(rows))
        return cutting.placed(self._inputs(grid, 0, cells, rows[None], cutting.taps))

    def _inputs(self, grid: Grid, first: int, cells: Tensor, hidden: Tensor, taps: Taps) -> VisualInputs:
        """One picture of a batch.

        Args:
            grid: its cells.
            first: its first row among the tower's rows; the CLS row, if there is one.
            cells: int64 [grid.n_tokens], the tower's row of each of its cells.
            hidden: [n_squares, n_rows, hidden_size] of the tower.
        """
        rows, cells, n = hidden.flatten(0, 1), cells.to(hidden.device), self.vision_tower.config.n_rows
        own, enc, needed = rows[cells], ENC in taps.wanted, CELLS in taps.wanted
        found = {s: t[cells] for s, t in taps.found.items() if s.kind != "qk"}
        end = first + n if len(grid.tiles) == 1 else first  # tiles do not attend to each other
        found |= {s: _apart(t[first:end]) for s, t in taps.found.items() if s.kind == "qk"}
        return VisualInputs(
            grid=grid,
            proj=self.multi_modal_projector(own),
            enc=own if enc else None,
            cls=rows[first].clone() if enc and taps.has_cls else None,  # a view would keep the whole batch alive
            cells=own if needed else None,
            project=self.multi_modal_projector if enc or needed else None,
            tower=self.spec.tower,
            taps=found,
        )

    def lay_out(self, segments: Sequence[int | Grid]) -> tuple[list[Tensor], int]:
        positions, start = [], 0
        for segment in segments:
            end = start + (segment.n_tokens if isinstance(segment, Grid) else segment)
            positions.append(torch.arange(start, end)[None])
            start = end
        return positions, start


FAMILY = Llava


def _apart(qk: Tensor) -> Tensor:
    """[rows, 2, heads, d], the CLS row among them, to queries and keys [2, rows, patches, heads, d] of one patch."""
    return qk[:, None].permute(2, 0, 1, 3, 4).contiguous()


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
