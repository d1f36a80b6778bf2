"""The geometry of Qwen2-VL: pictures of any size, one visual token per cell of merged patches, M-RoPE positions."""

from collections.abc import Sequence
from typing import ClassVar

from foveate.engine.common import Grid, ModelError, Section, Size
from foveate.engine.geometry.base import Checkpoint, CheckpointGeometry, Positions
from foveate.engine.geometry.config import QwenTowerConfig, read_qwen2_vl


class Qwen2VLGeometry(CheckpointGeometry):
    family: ClassVar[str] = "qwen2_vl"
    can_cut = True

    def __init__(self, checkpoint: Checkpoint) -> None:
        config, decoder = checkpoint.config, read_qwen2_vl(checkpoint.text)
        self.tower = self._read_tower(config.section("vision_config"))
        if self.tower.out_size != decoder.hidden_size:
            raise ModelError(
                f"{config.where}: the tower writes rows of {self.tower.out_size}, "
                f"the decoder reads {decoder.hidden_size}"
            )
        side, processor = self.tower.patch_size * self.tower.merge, checkpoint.processor
        if processor.rule != "smart" or processor.factor != side:
            raise ModelError(
                f"{config.where}: the image processor makes multiples of {processor.factor} pixels, "
                f"the tower reads cells of {side}"
            )
        super().__init__(checkpoint, decoder, config.integer("image_token_id", 151655), self.tower.tower)

    def _read_tower(self, config: Section) -> QwenTowerConfig:
        return QwenTowerConfig.read_qwen2_vl(config)

    def grid(self, height: int, width: int, original: Size | None = None) -> Grid:
        assert original is None, "these towers read pictures whole"
        return self.tower.grid(height, width)

    def n_patches(self, height: int, width: int) -> int:
        return self.grid(height, width).n_tokens * self.tower.cell

    def lay_out(self, segments: Sequence[int | Grid]) -> tuple[list[Positions], int]:
        """Text counts on all three axes; a picture holds still in time and counts its rows and columns, from where the
        text stopped; what follows starts after the largest of them."""
        positions: list[Positions] = []
        start = 0
        for segment in segments:
            if isinstance(segment, Grid):
                down, across = range(start, start + segment.rows), range(start, start + segment.cols)
                y = [row for row in down for _ in across]
                positions.append(([start] * len(y), y, [*across] * segment.rows))
                start += max(segment.rows, segment.cols)
            else:
                positions.append((range(start, start + segment),) * 3)
                start += segment
        return positions, start


FAMILY = Qwen2VLGeometry
