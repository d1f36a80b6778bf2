"""DUET-VLM, stage 2: in stages, keep the visual tokens that the words of the question attend to in the next layer.

Source: Singh et al., 2026, arXiv:2602.18846 (released code: AMD-AGI/DUET-VLM), its stage inside the language model. The
stage at the encoder is the reducer `duet`; `duet+duet2` is both.
The method is PyramidDrop with the mean over the words after the pictures in the place of the last word. Layers and
shares are the ones released for Qwen2.5-VL.
Departs from the paper: all words count; the paper may be given salient words from outside. Positions stay; the released
code renumbers the kept tokens, as `compact` does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from foveate.engine.prune.base import Kept, Staged, best
from foveate.engine.prune.probe import Probe


@dataclass(frozen=True, kw_only=True)
class Duet2(Staged):
    """Costs one row of attention per word and stage."""

    source: ClassVar[str] = "arXiv:2602.18846"
    paper: ClassVar[tuple[int, ...]] = (14, 21)
    depth: ClassVar[int] = 28

    shares: str = "0.5,0.25"
    rows: Literal["question", "last"] = "question"  # rows whose attention ranks; last: the prompt's last token

    def select(self, probe: Probe, counts: Sequence[int]) -> Kept:
        rows = probe.question if self.rows == "question" else probe.last
        return Kept(best(probe, probe.received(rows, "this"), counts))


METHOD = Duet2
