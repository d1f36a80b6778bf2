"""Information: every part gets a share in proportion to its visual tokens times its detail per token.

The detail is read from the pixels before anything is encoded: the mean absolute difference of neighbouring grey values,
in eighths of a grey level, plus one level. With the extra level, a blank page still counts for something, and noise of
one level does not decide.
"""

from collections.abc import Sequence

from torch import Tensor

from foveate.engine.reduce.base import Part, Split


class Information(Split):
    needs_pixels = True

    def weights(self, parts: Sequence[Part]) -> list[int]:
        return [part.n_tokens * _detail(part.pixels) for part in parts]


METHOD = Information


def _detail(pixels: Tensor | None) -> int:
    assert pixels is not None, "this way asks for pixels"
    grey = pixels.float().mean(-1)
    steps = [step.abs().mean() for step in (grey.diff(dim=0), grey.diff(dim=1)) if step.numel()]
    return 8 + round(8 * sum(float(step) for step in steps))
