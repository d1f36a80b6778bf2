"""HoliTom, inner merge: deep in the decoder, merge the visual tokens that FastV drops into the most similar kept ones.

Source: Shao et al., 2025, arXiv:2505.21334 (released code: cokeshao/HoliTom), its part inside the language model.
The kept tokens are those that the prompt's last token attends to most in the layer before. The dropped tokens merge in
reading order: the kept token with the nearest state by cosine becomes the mean of itself and the dropped token. So
later tokens weigh more, as released. `merge=mean` gives all tokens the same weight.
Departs from the paper: counts are rounded down, as in all methods here. Tokens merge within their picture; if a picture
keeps no token, none of its tokens merge. The default k is the 18 of 28 layers of the authors' evaluation, scaled to the
depth; the 3 in the released code holds only where nothing sets k.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from foveate.engine.primitives.ranking import complement
from foveate.engine.prune.base import Kept, as_they_are, best
from foveate.engine.prune.methods.fastv import FastV
from foveate.engine.prune.probe import Probe


@dataclass(frozen=True, kw_only=True)
class HoliTom(FastV):
    """Rows of the mix sum to 1."""

    source: ClassVar[str] = "arXiv:2505.21334"
    paper: ClassVar[tuple[int, int]] = (18, 28)

    merge: Literal["sequential", "mean"] = "sequential"  # sequential: later tokens weigh more

    def select(self, probe: Probe, counts: Sequence[int]) -> Kept:
        keep = best(probe, probe.attention(probe.last)[0], counts)
        gone = complement(keep, len(probe.visual))
        alike = self._alike(probe, gone, keep)
        gone, alike = gone[alike.isfinite().any(1)], alike[alike.isfinite().any(1)]
        mix = as_they_are(keep, len(probe.visual))
        if len(gone):
            into = alike.argmax(1)
            size = torch.bincount(into, minlength=len(keep))
            mix[torch.arange(len(keep), device=keep.device), keep] = self._left(size, size)
            mix[into, gone] = self._left(size[into], size[into] - 1 - _order(into, size)) / self._divisor
        return Kept(keep, mix)

    @property
    def _divisor(self) -> float:
        return 2.0 if self.merge == "sequential" else 1.0

    def _left(self, size: Tensor, later: Tensor) -> Tensor:
        """The weight left of a row when `later` of all `size` merged tokens merge after it."""
        return 0.5 ** later.float() if self.merge == "sequential" else 1 / (size + 1).float()

    def _alike(self, probe: Probe, gone: Tensor, keep: Tensor) -> Tensor:
        """[len(gone), k] cosines of the states; -inf between pictures."""
        states = torch.nn.functional.normalize(probe.rows[probe.visual].float(), dim=-1)
        apart = probe.picture[gone][:, None] != probe.picture[keep][None]
        return (states[gone] @ states[keep].T).masked_fill(apart, -torch.inf)


def _order(into: Tensor, size: Tensor) -> Tensor:
    """[n] int64: the number of earlier tokens in the list with the same target."""
    by_target = torch.sort(into, stable=True).indices
    first = size.cumsum(0) - size
    place = torch.arange(len(into), device=into.device)
    return torch.empty_like(into).index_copy(0, by_target, place - first[into[by_target]])


METHOD = HoliTom
