"""Area: every part gets a share in proportion to its visual tokens, so all parts have one resolution. The default."""

from foveate.engine.reduce.base import Area

METHOD = Area
