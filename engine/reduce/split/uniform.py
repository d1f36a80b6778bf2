"""Uniform: every part gets the same share, whatever its size."""

from collections.abc import Sequence

from foveate.engine.reduce.base import Part, Split


class Uniform(Split):
    def weights(self, parts: Sequence[Part]) -> list[int]:
        return [1] * len(parts)


METHOD = Uniform
