"""TextMonkey: keep the tokens that no later token of the page resembles.

Source: Liu et al., 2024, arXiv:2403.04473 (released code: Yuliang-Liu/Monkey), the filter before its resampler.
A token ranks higher, the smaller its largest cosine with any later token is. Of several copies, the last one stays. The
very last token always stays. The crops of a tiled picture are compared together: a token that a later crop repeats is
dropped.
Departs from the paper: the resampler, which mixes dropped tokens into kept tokens, is trained, and is left out. The
paper appends the whole thumbnail; here the thumbnail is filtered by itself once it would take more than its share of
the budget. "Later" means later in reading order over the whole picture, not crop by crop. Rows are compared before the
projector, or after the projector if the encoder merges patches.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import ENC, Signal, Tower
from foveate.engine.primitives.ranking import top, unit
from foveate.engine.reduce.base import Fits, Group, Reducer
from foveate.engine.vision import VisualInputs


@dataclass(frozen=True, kw_only=True)
class TextMonkey(Reducer):
    """Needs no attention. Kept sets of an untiled picture are nested. Costs n^2 * C multiply-adds."""

    source: ClassVar[str] = "arXiv:2403.04473"
    group: ClassVar[Group] = "by unlikeness or coverage"
    fits: ClassVar[Fits] = "tiles"
    tile_aware: ClassVar[bool] = True

    thumbnail_ratio: float = 1 / 3  # largest share of the budget for the thumbnail; the paper's 256 of 768

    def __post_init__(self) -> None:
        if not 0.0 <= self.thumbnail_ratio <= 1.0:
            raise ConfigError(f"thumbnail_ratio: {self.thumbnail_ratio} is not in [0, 1]")

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({ENC})

    def select(self, inputs: VisualInputs, k: int) -> Tensor:
        rows = inputs.proj if inputs.enc is None else inputs.enc
        n_thumbnail = inputs.grid.n_thumbnail
        if inputs.places is not None:  # the tokens of the thumbnail that an earlier method left
            n_thumbnail = int((inputs.places < n_thumbnail).sum())
        n_crops = inputs.n - n_thumbnail
        of_thumbnail = max(min(n_thumbnail, round(k * self.thumbnail_ratio)), k - n_crops)
        thumbnail = unlike_later(rows[:n_thumbnail], of_thumbnail)
        return torch.cat([thumbnail, n_thumbnail + unlike_later(rows[n_thumbnail:], k - of_thumbnail)])


def unlike_later(rows: Tensor, k: int) -> Tensor:
    """[k] int64, increasing: the rows whose largest cosine with a later row is smallest."""
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=rows.device)
    rows = unit(rows)
    not_later = torch.ones(len(rows), len(rows), dtype=torch.bool, device=rows.device).tril()
    alike = (rows @ rows.T).masked_fill(not_later, -torch.inf).amax(1)  # -inf for the last
    return top(-alike, k)


METHOD = TextMonkey
