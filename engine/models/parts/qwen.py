"""What Qwen2-VL and Qwen2.5-VL share around their towers: naming, M-RoPE positions, the decoder."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from foveate.engine.common.errors import ModelError
from foveate.engine.common.grid import Grid
from foveate.engine.common.section import Section
from foveate.engine.images.anyres import Size
from foveate.engine.models.parts.decoder import read_qwen2_vl
from foveate.engine.models.parts.family import Family, Source
from foveate.engine.models.parts.pixels import normalise
from foveate.engine.models.parts.qwen_tower import QwenTower
from foveate.engine.vision.cut import TowerCut
from foveate.engine.vision.inputs import VisualInputs
from foveate.engine.vision.signals import CELLS, Signal


class QwenVL(Family):
    """A tower whose merger writes decoder rows directly: one visual token per cell of merged patches."""

    family: str  # set by the subclass; the config's model_type
    can_cut = True

    def __init__(self, source: Source) -> None:
        super().__init__(source, read_qwen2_vl(source.text))
        self.visual = self.tower(source.config.section("vision_config"), source.device)
        self._check(source.config, self.language_model.config.hidden_size)
        image_token_id = source.config.integer("image_token_id", 151655)
        self.spec = self._spec(self.family, source, image_token_id, self.visual.tower)

    @abstractmethod
    def tower(self, config: Section, device: torch.device) -> QwenTower:
        """The vision tower of `vision_config`."""

    def _check(self, config: Section, hidden_size: int) -> None:
        tower = self.visual.config
        if tower.out_size != hidden_size:
            raise ModelError(
                f"{config.where}: the tower writes rows of {tower.out_size}, the decoder reads {hidden_size}"
            )
        if self.processor.rule != "smart" or self.processor.factor != tower.patch_size * tower.merge:
            raise ModelError(
                f"{config.where}: the image processor makes multiples of {self.processor.factor} pixels, "
                f"the tower reads cells of {tower.patch_size * tower.merge}"
            )

    def rename(self, name: str) -> str | None:
        if name.startswith(("visual.", "language_model.", "lm_head.")):
            return name
        rest = name.removeprefix("model.")
        return rest if rest.startswith(("visual.", "language_model.")) else f"language_model.{rest}"

    def grid(self, height: int, width: int, original: Size | None = None) -> Grid:
        assert original is None, "these towers read pictures whole"
        return self.visual.config.grid(height, width)

    def n_patches(self, height: int, width: int) -> int:
        return self.grid(height, width).n_tokens * self.visual.config.cell

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
            grid=self.grid(image.shape[0], image.shape[1]),
            proj=merged.clone(),
            tower=self.spec.tower,
            taps={s: _of_picture(s, t) for s, t in found.items() if s != CELLS},
            cells=found[CELLS].clone() if CELLS in found else None,
            project=self.visual.project if CELLS in found else None,
        )

    def lay_out(self, segments: Sequence[int | Grid]) -> tuple[list[Tensor], int]:
        """Text counts on all three axes; a picture holds still in time and counts its rows and columns, from where the
        text stopped; what follows starts after the largest of them."""
        positions, start = [], 0
        for segment in segments:
            if isinstance(segment, Grid):
                y = torch.arange(segment.rows).repeat_interleave(segment.cols)
                x = torch.arange(segment.cols).repeat(segment.rows)
                positions.append(torch.stack([torch.zeros_like(y), y, x]) + start)
                start += max(segment.rows, segment.cols)
            else:
                positions.append(torch.arange(start, start + segment).expand(3, -1))
                start += segment
        return positions, start


def _of_picture(signal: Signal, values: Tensor) -> Tensor:
    """A copy; of `qk`, queries and keys apart: [2, tokens, patches, heads, d]."""
    return values.movedim(2, 0).contiguous() if signal.kind == "qk" else values.clone()
