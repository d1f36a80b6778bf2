"""LLaVA-1.5: a CLIP or SigLIP tower, a two-layer projector, a Llama, Mistral or Qwen2 decoder.

Not here: projectors over several hidden states.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from foveate.engine.common import CELLS, ENC, Grid, Signal, Size
from foveate.engine.geometry.llava import LlavaGeometry
from foveate.engine.models.family import Family
from foveate.engine.models.parts.layers import Linear
from foveate.engine.models.parts.tower import Taps, normalise
from foveate.engine.models.parts.vit import Vit
from foveate.engine.vision import TowerCut, VisualInputs

_LAYER = re.compile(r"vision_tower\.encoder\.layers\.(\d+)\.")
_UNUSED = ("vision_tower.post_layernorm.", "vision_tower.head.")


class Llava(Family):
    geometry: LlavaGeometry

    def __init__(self, geometry: LlavaGeometry, device: torch.device) -> None:
        super().__init__(geometry, device)
        self.vision_tower = Vit(geometry.tower)
        self.multi_modal_projector = _Projector(geometry)

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

    def encode(
        self, images: Sequence[Tensor], signals: frozenset[Signal], originals: Sequence[Size | None] | None = None
    ) -> list[VisualInputs]:
        hidden, taps = self.vision_tower([normalise(image, self.processor) for image in images], signals)
        config = self.vision_tower.config
        grid = self.geometry.grid(config.image_size, config.image_size)
        cells = torch.arange(self.geometry.n_skipped, config.n_rows)
        return [self._inputs(grid, start, start + cells, hidden, taps) for start in taps.bounds[:-1]]

    def encode_cut(self, image: Tensor, signals: frozenset[Signal], cut: TowerCut) -> VisualInputs:
        rows, cutting = self.vision_tower.run_cut(normalise(image, self.processor), signals, cut)
        grid = self.geometry.grid(image.shape[0], image.shape[1])
        cells = torch.arange(self.geometry.n_skipped, len(rows))
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


FAMILY = Llava


def _apart(qk: Tensor) -> Tensor:
    """[rows, 2, heads, d], the CLS row among them, to queries and keys [2, rows, patches, heads, d] of one patch."""
    return qk[:, None].permute(2, 0, 1, 3, 4).contiguous()


class _Projector(nn.Module):
    def __init__(self, geometry: LlavaGeometry) -> None:
        super().__init__()
        n_in, n_out, bias = geometry.tower.hidden_size, geometry.decoder.hidden_size, geometry.projector_bias
        self.linear_1 = Linear(n_in, n_out, bias=bias)
        self.linear_2 = Linear(n_out, n_out, bias=bias)
        self.act = geometry.projector_act

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(self.linear_1(x, self.act))
        return out
