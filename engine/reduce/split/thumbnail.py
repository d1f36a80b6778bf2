"""Thumbnail: half of the budget to a tiled image's thumbnail, the rest to its crops by the thumbnail's attention.

Source: the allocation of HiRED (arXiv:2408.10945) with alpha = 1/2, by the attention on a crop's region instead of hit
counts.
Images without tiles, and several images among each other, share by area.
"""

from collections.abc import Sequence

from foveate.engine.reduce.base import Part, Split

_STEPS = 1 << 20  # attention becomes integers, so that shares are exact


class Thumbnail(Split):
    needs_attention = True

    def weights(self, parts: Sequence[Part]) -> list[int]:
        if any(part.attention is None for part in parts):
            return [part.n_tokens for part in parts]
        return [max(1, round(part.attention * _STEPS)) for part in parts if part.attention is not None]


METHOD = Thumbnail
