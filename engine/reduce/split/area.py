"""Area: in proportion to the visual tokens offered, so every part is seen at one resolution. The default."""

from foveate.engine.reduce.sharing import Area

METHOD = Area
