"""The geometry of LLaVA-OneVision: LLaVA-NeXT's tiles, more of them, cells scaled down where they are too many."""

import re
from itertools import product
from typing import ClassVar

from foveate.engine.common import ModelError, Section, Size
from foveate.engine.geometry.llava_next import LlavaNextGeometry


class LlavaOnevisionGeometry(LlavaNextGeometry):
    family: ClassVar[str] = "llava_onevision"
    text_type: ClassVar[str] = "qwen2"
    select_layer: ClassVar[int] = -1
    strategy: ClassVar[str] = "full"
    image_token: ClassVar[int] = 151646
    sizes: ClassVar[tuple[Size, ...]] = tuple((384 * rows, 384 * cols) for rows, cols in product(range(1, 7), repeat=2))

    def _most_tiles(self, config: Section) -> int | None:
        rule = config.text("vision_aspect_ratio", "anyres_max_9")
        found = re.fullmatch(r"anyres_max_([1-9]\d*)", rule)
        if found is None:
            raise ModelError(
                f"{config.where}: vision_aspect_ratio {rule!r} is not supported, only 'anyres_max_<tiles>'"
            )
        return int(found[1])


FAMILY = LlavaOnevisionGeometry
