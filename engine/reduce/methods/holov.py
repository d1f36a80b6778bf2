"""HoloV: share the budget among strips of the picture, and keep the most attended tokens of each strip.

Source: Zou et al., 2025, arXiv:2510.02912 (released code: obananas/HoloV).
The tokens are cut in reading order into crops of equal size. The score of a token is its attention plus, on the same
scale, the variance of its cosines with the other tokens of its crop. A crop gets tokens by its mean score, rounded
down; the remaining tokens go to the best crops. Within a crop, attention alone decides.
Departs from the paper: the variance of a token leaves out its cosine with itself; the released code counts a zero for
it (`compat` restores that). Tokens beyond the size of a crop go to the other crops by score; the released code fills up
with rows of zeros. The paper's scale makes attention and variance equal in mean within each crop, so the score of a
crop is almost its attention alone. `balance=picture` makes them equal over the picture, so that variance counts.
Without a CLS row, attention received ranks the tokens. A picture in tiles is reduced tile by tile.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Literal

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import Signal, Tower, signals
from foveate.engine.primitives.math import largest_remainder
from foveate.engine.primitives.ranking import saliency, top, unit
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import VisualInputs

_ATTENTION_SCALE, _EPS = 1000.0, 1e-6  # as released


@dataclass(frozen=True, kw_only=True)
class HoloV(Reducer):
    """Reads one attention row and the cosines within crops."""

    source: ClassVar[str] = "arXiv:2510.02912"
    group: ClassVar[Group] = "by attention"

    crops: int = 16  # number of crops: runs of tokens in reading order
    alpha: float = 0.09  # weight of the variance of cosines; attention weighs 1
    balance: Literal["crop", "picture"] = "crop"  # the area within which attention and variance have equal means
    compat: bool = False  # the cosine of a token with itself counts as zero, as released

    def __post_init__(self) -> None:
        if not 1 <= self.crops <= 4096:
            raise ConfigError(f"crops: {self.crops} is not in [1, 4096]")
        if not 0.0 <= self.alpha <= 100.0:
            raise ConfigError(f"alpha: {self.alpha} is not in [0, 100]")

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({signals.saliency()})

    def select(self, inputs: VisualInputs, k: int) -> Tensor:
        attention, n = saliency(inputs), inputs.n
        n_crops = min(self.crops, n)
        sizes = [n // n_crops + (i < n % n_crops) for i in range(n_crops)]
        spread = torch.cat([self._spread(rows) for rows in torch.split(unit(inputs.proj), sizes)])
        shares = _share(self._worth(attention, spread, sizes), k, sizes)
        starts = accumulate(sizes, initial=0)
        parts = zip(torch.split(attention, sizes), shares, starts, strict=False)  # there is one more start
        return torch.cat([start + top(part, share) for part, share, start in parts])

    def _spread(self, rows: Tensor) -> Tensor:
        """[c] float32: the variance of each row's cosines with the other rows. `rows` is [c, D], of unit length."""
        n = rows.shape[0]
        itself = torch.eye(n, dtype=torch.bool, device=rows.device)
        cosine, n_others = (rows @ rows.T).masked_fill(itself, 0.0), max(n - 1, 1)
        apart = (cosine - cosine.sum(1, keepdim=True) / n_others).square()
        if not self.compat:
            apart = apart.masked_fill(itself, 0.0)
        return apart.sum(1) / n_others

    def _worth(self, attention: Tensor, spread: Tensor, sizes: list[int]) -> list[float]:
        """The mean score of each crop."""

        def means(values: Tensor) -> Tensor:
            return torch.stack([part.mean() for part in torch.split(values, sizes)])

        focus, varied = means(attention * _ATTENTION_SCALE), means(spread)
        if self.balance == "crop":
            scale = focus / (varied + _EPS)
        else:
            scale = attention.mean() * _ATTENTION_SCALE / (spread.mean() + _EPS)
        worth: list[float] = (focus + self.alpha * scale * varied).tolist()
        return worth


def _share(worth: Sequence[float], k: int, caps: Sequence[int]) -> list[int]:
    """Tokens of each crop: by worth, rounded down, one more for the best. Tokens above a cap are shared again."""
    whole = sum(worth) + _EPS
    shares = [int(w / whole * k) for w in worth]
    best = sorted(range(len(worth)), key=lambda i: (-worth[i], i))
    for turn in range(k - sum(shares)):
        shares[best[turn % len(best)]] += 1
    shares = [min(share, cap) for share, cap in zip(shares, caps, strict=True)]
    room = [cap - share for share, cap in zip(shares, caps, strict=True)]
    more = largest_remainder(worth, k - sum(shares), room)
    return [share + extra for share, extra in zip(shares, more, strict=True)]


METHOD = HoloV
