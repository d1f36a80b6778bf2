"""AIM: merge the most similar pairs of tokens, at most half of the tokens in one pass.

Source: Zhong et al., 2024, arXiv:2412.03248 (released code: LaVi-Lab/AIM), the merging before the language model.
The method matches every other row with the most similar of the remaining rows, by the cosine of the rows that the
language model would read. It averages the best matches. One pass merges at most half of the rows, and passes repeat
until the budget is met.
Departs from the paper: the paper's model pools video frames two by two before merging; this method does not. Rows stay
in reading order, and the order decides which rows may match in the next pass. The released code orders the unmerged
rows by falling similarity and puts them before the others; `compat` uses that order between passes, and the output is
in reading order all the same. As released, a row that merges again counts as one row; `weighted` counts the tokens in
the row. The paper's second stage, which prunes inside the language model, is the method `aim2`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.engine.primitives.merge import bipartite, match
from foveate.engine.primitives.ranking import finite
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import TokenTransform, VisualInputs


@dataclass(frozen=True, kw_only=True)
class AIM(Reducer):
    """Needs no attention. Every source token is in exactly one output row."""

    source: ClassVar[str] = "arXiv:2412.03248"
    group: ClassVar[Group] = "select and merge"

    weighted: bool = False  # an output row is the plain mean of its tokens, in whatever order they merged
    compat: bool = False  # rows enter the next pass in the order in which merging leaves them, as released

    def transform(self, inputs: VisualInputs, k: int) -> TokenTransform:
        rows = finite("features", inputs.proj)
        anchor = slot = torch.arange(inputs.n, device=rows.device)  # the token each row stands at; each token's row
        share, mass = torch.ones_like(rows[:, 0]), torch.ones_like(rows[:, 0])  # weight of a token in its row; of a row
        while len(rows) > k:
            into = bipartite(rows, len(rows) - k)
            left = self._left(rows, into)
            new = torch.arange(len(left), device=rows.device)
            goes_to = torch.empty_like(into).index_copy(0, left, new)[into]
            member = (goes_to == new[:, None]) * mass
            total = member.sum(1)
            rows = member @ rows / total[:, None]  # a product, because scattered sums have no fixed order on a GPU
            share = share * (mass / total[goes_to])[slot]
            anchor, slot = anchor[left], goes_to[slot]
            mass = total if self.weighted else torch.ones_like(total)
        anchor, order = anchor.sort()
        rank = torch.empty_like(order).index_copy(0, order, torch.arange(k, device=order.device))
        return TokenTransform.merging(rank[slot], anchor, share)

    def _left(self, rows: Tensor, into: Tensor) -> Tensor:
        """The rows left after a pass, in their order for the next pass."""
        every = torch.arange(len(into), device=into.device)
        if not self.compat:
            return every[into == every]
        alike = 2 * torch.sort(match(rows).score, descending=True, stable=True).indices
        return torch.cat([alike[into[alike] == alike], every[1::2]])


METHOD = AIM
