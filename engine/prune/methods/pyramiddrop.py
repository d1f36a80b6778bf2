"""PyramidDrop: in stages, keep the visual tokens that the prompt's last token attends to in the next layer.

Source: Xing et al., 2024, arXiv:2410.17247 (released code: Cooperx521/PyramidDrop).
Before the first layer of a stage, the queries and keys of that layer are computed and rank the tokens left. Shares are
of the tokens that entered. The paper's stages begin after a quarter, half and three quarters of the decoder.
Departs from the paper: positions stay; the released code renumbers the kept tokens, as `compact` does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from foveate.engine.prune.base import Kept, Staged, best
from foveate.engine.prune.probe import Probe


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(Staged):
    """Each stage ranks again. The kept sets are nested, because a dropped token never returns."""

    source: ClassVar[str] = "arXiv:2410.17247"
    paper: ClassVar[tuple[int, ...]] = (8, 16, 24)
    depth: ClassVar[int] = 32

    shares: str = "0.5,0.25,0.125"

    def select(self, probe: Probe, counts: Sequence[int]) -> Kept:
        return Kept(best(probe, probe.attention(probe.last, "this")[0], counts))


METHOD = PyramidDrop
