"""Area: in proportion to the visual tokens offered, so every part is seen at one resolution. The default."""

from collections.abc import Sequence

from foveate.engine.reduce.split.base import Part, Split


class Area(Split):
    def weights(self, parts: Sequence[Part]) -> list[int]:
        return [part.n_tokens for part in parts]


METHOD = Area
