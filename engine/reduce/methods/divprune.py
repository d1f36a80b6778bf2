"""DivPrune: keep the visual tokens that are farthest apart.

Source: Alvar et al., 2025, arXiv:2503.02175 (max-min diversity, greedy; released code: vbdi/divprune).
A picture in tiles is one set: a token of a crop that repeats a token of the thumbnail, or of another crop, goes.
Departs from the paper: distances are in float32 for every dtype of the model. In bfloat16 ties are common, and the kept
set would depend on the device. A kept token is masked; the released code relies on rounding not to pick a token twice.
Kept tokens keep their positions in the prompt. Newlines of a picture in tiles do not take part and are dropped; in the
released code they are tokens like others.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from foveate.engine.primitives.greedy import farthest
from foveate.engine.primitives.ranking import finite
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import VisualInputs


@dataclass(frozen=True, kw_only=True)
class DivPrune(Reducer):
    """Needs no attention weights and no text. Kept sets are nested: a smaller budget keeps a subset."""

    source: ClassVar[str] = "arXiv:2503.02175"
    group: ClassVar[Group] = "by unlikeness or coverage"
    tile_aware: ClassVar[bool] = True

    start: Literal["isolated", "farthest_pair"] = "isolated"  # the first token; isolated: farthest from the next

    def select(self, inputs: VisualInputs, k: int) -> Tensor:
        """Cost: M^2 * D multiply-adds once, then k passes over M numbers; M^2 floats of memory, M over all tiles."""
        unit = torch.nn.functional.normalize(finite("features", inputs.proj), dim=-1)
        # [M, M], 0: same direction, 2: opposite. In place, because a picture in tiles may have thousands of tokens.
        distance = (unit @ unit.T).neg_().add_(1)
        if self.start == "isolated":
            first = distance.fill_diagonal_(torch.inf).amin(0).argmax(0, keepdim=True)
            distance.fill_diagonal_(0.0)
        else:
            first = distance.amax(1).argmax(0, keepdim=True)  # its partner is the farthest token, so it follows

        def distance_from(token: Tensor) -> Tensor:
            return distance.index_select(0, token)[0]

        rest = farthest(distance_from(first), distance_from, first, k - 1)
        return torch.cat([first, rest]).sort().values


METHOD = DivPrune
