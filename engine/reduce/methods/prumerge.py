"""PruMerge: keep tokens with outlying attention and tokens spread over the picture, and merge the rest into them.

Source: Shang et al., 2024, arXiv:2403.15388 (PruMerge+; released code: 42Shawn/LLaVA-PruMerge).
Outliers are tokens that the CLS row attends to more than Q3 + 1.5 (Q3 - Q1). Each kept token takes in the 32 tokens of
most similar attention keys, weighted by attention. One further row is the weighted sum of all tokens that are not kept.
Departs from the paper: the budget sets the count, not the outliers. If there are more outliers, the most attended are
kept. If there are fewer, tokens evenly spread over the others follow, more densely or sparsely than the paper's three
per outlier (`spatial=False`: the next tokens by attention, PruMerge without the plus). In a picture without outliers,
the most attended token counts as one. Rows are weighted means, so they are as large as visual tokens. `compat` restores
the released sums, where the kept token weighs 1 and attention adds to that weight. The further row takes the place of
the most attended token in it, and all rows are in reading order. Attention and keys are those of the layer whose output
the projector reads, because the paper's layer after it does not run. Without a CLS row, attention received ranks the
tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import ENC, Signal, Tower, signals
from foveate.engine.primitives.ranking import centres, complement, finite, top, unit
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import TokenTransform, VisualInputs, starts

_LEAST = 1e-12  # least attention, so that no weighted mean is 0 / 0


@dataclass(frozen=True, kw_only=True)
class PruMerge(Reducer):
    """Every source token is in at least one output row, if there are at least two output rows."""

    source: ClassVar[str] = "arXiv:2403.15388"
    group: ClassVar[Group] = "select and merge"

    spatial: bool = True  # PruMerge+: tokens beyond the outliers are spread evenly; False: they follow by attention
    n_neighbours: int = 32  # number of tokens that merge into each kept token
    compat: bool = False  # sums instead of means, as released

    def __post_init__(self) -> None:
        if not 0 <= self.n_neighbours <= 4096:
            raise ConfigError(f"n_neighbours: {self.n_neighbours} is not in [0, 4096]")

    def needs(self, tower: Tower) -> frozenset[Signal]:
        attention = signals.cls_cat() if tower.has_cls else signals.recv()
        return frozenset({attention, signals.keys_cat(), ENC})

    def transform(self, inputs: VisualInputs, k: int) -> TokenTransform:
        attention = self._attention(inputs)
        kept = self.kept(attention, max(k - 1, 1))
        terms = self._neighbours(inputs, attention, kept)
        anchor = kept
        if k > 1:
            rest = complement(kept, inputs.n)
            further = torch.zeros(1, inputs.n).index_copy_(1, rest, attention[None, rest])
            terms = torch.cat([terms, further])
            anchor = torch.cat([kept, rest[attention[rest].argmax(0, keepdim=True)]])
        if not self.compat:
            terms = terms / terms.sum(1, keepdim=True, dtype=torch.float64).float()
        order = anchor.sort().indices
        matrix = terms[order]
        entries = matrix.nonzero()
        size = torch.bincount(entries[:, 0], minlength=k)
        return TokenTransform(
            n_in=inputs.n,
            indptr=starts(size),
            indices=entries[:, 1],
            weights=matrix[entries[:, 0], entries[:, 1]],
            anchor=anchor[order],
            size=size,
            space=inputs.space,
        )

    def _attention(self, inputs: VisualInputs) -> Tensor:
        """[n] float32, above 0, on the CPU."""
        has_cls = inputs.tower.has_cls
        attention = finite("attention weights", inputs.cls_cat() if has_cls else inputs.recv()).cpu()
        attention = attention.clamp(min=_LEAST)
        return attention if has_cls else attention / attention.sum()

    def kept(self, attention: Tensor, k: int) -> Tensor:
        """[k] int64, increasing: the outliers and the tokens that fill the budget."""
        low, high = torch.quantile(attention, torch.tensor([0.25, 0.75]))
        n_outliers = max(1, int((attention > high + 1.5 * (high - low)).sum()))
        best = top(attention, min(n_outliers, k) if self.spatial else k)
        if len(best) == k:
            return best
        others = complement(best, len(attention))
        return torch.cat([best, others[centres(len(others), k - len(best))]]).sort().values

    def _neighbours(self, inputs: VisualInputs, attention: Tensor, kept: Tensor) -> Tensor:
        """[len(kept), n] float32: the weight of each token in each kept row; the kept token itself weighs 1."""
        keys = unit(inputs.keys_cat())
        likeness = (keys[kept.to(keys.device)] @ keys.T).cpu().scatter_(1, kept[:, None], -torch.inf)
        near = torch.sort(likeness, dim=1, descending=True, stable=True).indices[:, : self.n_neighbours]
        terms = torch.zeros_like(likeness).scatter_(1, near, attention[near])
        return terms.scatter_(1, kept[:, None], 1.0)


METHOD = PruMerge
