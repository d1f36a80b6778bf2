"""The geometry of Qwen2.5-VL: that of Qwen2-VL, over a tower whose blocks attend within windows."""

from typing import ClassVar

from foveate.engine.common import Section
from foveate.engine.geometry.config import QwenTowerConfig
from foveate.engine.geometry.qwen2_vl import Qwen2VLGeometry


class Qwen25VLGeometry(Qwen2VLGeometry):
    family: ClassVar[str] = "qwen2_5_vl"

    def _read_tower(self, config: Section) -> QwenTowerConfig:
        return QwenTowerConfig.read_qwen2_5_vl(config)


FAMILY = Qwen25VLGeometry
