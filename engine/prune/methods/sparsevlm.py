"""SparseVLM: in stages, keep the visual tokens that the words related to the picture attend to.

Source: Zhang et al., 2024, arXiv:2410.04417 (released code: Gumpest/SparseVLMs), by default its second version.
Raters are words of the question that visual tokens resemble more than the average word, by the rows that enter the
first layer. The raters' attention in the layer before ranks the tokens. The attention is divided by RoPE's pull at each
distance (the attention between equal states), and averaged over the half of the heads that attend to the picture most.
`version=v1` ranks by plain attention over all heads, clusters the best 30 % of the dropped tokens by density peaks,
about ten in each cluster, and keeps the mean of each cluster.
Departs from the paper: the raters are words of the question, chosen again at each point from the visual tokens left. If
no word stands out, all words are raters. The released code averages over 14 heads whatever the model has, the half of a
28-head decoder; with 32 heads, the half keeps 90 % of the same tokens. The pull passes through zero, so it counts as at
least a twentieth of its greatest value. In v1, clusters are part of the count and stand at their centres, a fixed draw
breaks ties of density, and positions stay (`compact` renumbers the kept tokens, as released for v1). Shares are the
paper's 300, 200 and 118 of 576 tokens, its 192 on average.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from foveate.engine.primitives.merge import dpc_knn
from foveate.engine.primitives.ranking import complement, top
from foveate.engine.prune.base import Kept, Staged, as_they_are, best
from foveate.engine.prune.probe import Probe

_LEAST_PULL = 0.05


@dataclass(frozen=True, kw_only=True)
class SparseVLM(Staged):
    """Costs one row of attention per rater and stage."""

    source: ClassVar[str] = "arXiv:2410.04417"
    reads_inputs: ClassVar[bool] = True
    paper: ClassVar[tuple[int, ...]] = (3, 7, 16)  # after layers 2, 6 and 15
    depth: ClassVar[int] = 32

    shares: str = "0.521,0.348,0.205"
    version: Literal["v1", "v2"] = "v2"  # v1: attention over all heads, dropped tokens in clusters

    def select(self, probe: Probe, counts: Sequence[int]) -> Kept:
        raters = self.raters(probe)
        if self.version == "v2":
            return Kept(best(probe, self._without_pull(probe, raters), counts))
        scores = probe.received(raters)
        present = torch.bincount(probe.picture, minlength=len(counts)).tolist()
        merged = [_n_merged(n, count) for n, count in zip(present, counts, strict=True)]
        plain = best(probe, scores, [count - few for count, few in zip(counts, merged, strict=True)])
        return self._with_clusters(probe, scores, plain, merged)

    def raters(self, probe: Probe) -> Tensor:
        """[R] int64: the rows of the question's words that rate; at least one."""
        inputs = probe.inputs().float()
        words = (inputs[probe.visual] @ inputs[probe.question].T).softmax(1).mean(0)
        found = probe.question[words > words.mean()]
        return found if len(found) else probe.question

    def _without_pull(self, probe: Probe, raters: Tensor) -> Tensor:
        """[V] float32."""
        view = probe.views("before")
        cos, sin = (torch.cat([part[raters], part[probe.visual]]) for part in (view.cos, view.sin))
        n, half = len(raters), view.cos.shape[1]
        pull = (cos[:n] @ cos[n:].T + sin[:n] @ sin[n:].T) / half  # [R, V], 1 at distance 0
        scores = (probe.attention(raters, per_head=True) / pull.clamp(min=_LEAST_PULL)).mean(1)  # [n_heads, V]
        return scores[top(scores.sum(1), -(-len(scores) // 2))].mean(0)

    def _with_clusters(self, probe: Probe, scores: Tensor, plain: Tensor, merged: Sequence[int]) -> Kept:
        n, states = len(probe.visual), probe.rows[probe.visual]
        gone = complement(plain, n)
        owner, centres = torch.full((n,), -1, device=plain.device), [plain]
        for picture, few in enumerate(merged):
            mine = gone[probe.picture[gone] == picture]
            if few:
                pool = mine[top(scores[mine], _n_recycled(len(mine)))]
                found = dpc_knn(states[pool], few, few)
                owner[pool] = pool[found.centres][found.owner]
                centres.append(pool[found.centres])
        keep = torch.cat(centres).sort().values
        member = owner[None] == keep[:, None]
        size = member.sum(1, keepdim=True)
        return Kept(keep, torch.where(size > 0, member / size.clamp(min=1), as_they_are(keep, n)))


def _n_recycled(n_gone: int) -> int:
    """Number of dropped tokens that go into clusters."""
    return int(0.3 * n_gone) + 1


def _n_merged(n: int, count: int) -> int:
    """Clusters among the `count` rows that stay of n: as many as in the paper, but at least one row is no cluster."""
    few = 0
    while count < n and few < count - 1 and few < _n_recycled(n - count + few) // 10 + 1:
        few += 1
    return few


METHOD = SparseVLM
