"""VMTC: keep the most attended tokens, and merge the others into clusters of similar tokens.

Source: Yang et al., 2024, arXiv:2411.15453, its visual-modality token compression.
Three quarters of the budget are primary tokens, kept as they are. The other tokens form as many clusters as the rest of
the budget has tokens, by density peaks. Each cluster becomes its mean, weighted by attention, at its centre.
Departs from the paper: the method is written from the abstract, so the share of primary tokens, the clustering and its
neighbours are ours. The rows before the projector are clustered and mixed, or the rows after the projector if the
encoder merges patches. Without a CLS row, attention received ranks and weighs the tokens. The paper's second half,
which inhibits attention inside the language model, is not part of this method.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.configs.errors import ConfigError
from foveate.engine.common import ENC, Signal, Tower, signals
from foveate.engine.primitives.merge import dpc_knn, select_and_merge
from foveate.engine.primitives.ranking import complement, finite, saliency, top
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import TokenTransform, VisualInputs


@dataclass(frozen=True, kw_only=True)
class VMTC(Reducer):
    """Every source token is in exactly one output row."""

    source: ClassVar[str] = "arXiv:2411.15453"
    group: ClassVar[Group] = "select and merge"

    primary_ratio: float = 0.75  # share of tokens kept as they are, rounded; 1: selection only
    n_neighbours: int = 5  # tokens that a density counts, the token itself included

    def __post_init__(self) -> None:
        if not 0.0 <= self.primary_ratio <= 1.0:
            raise ConfigError(f"primary_ratio: {self.primary_ratio} is not in [0, 1]")
        if not 1 <= self.n_neighbours <= 64:
            raise ConfigError(f"n_neighbours: {self.n_neighbours} is not in 1..64")

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({signals.saliency(), ENC})

    def transform(self, inputs: VisualInputs, k: int) -> TokenTransform:
        worth = saliency(inputs).cpu()
        primary = top(worth, round(k * self.primary_ratio))
        n_clusters = k - len(primary)
        if n_clusters == 0:
            return TokenTransform.selection(primary, inputs.n)
        left = complement(primary, inputs.n)
        rows = finite("features", inputs.proj if inputs.enc is None else inputs.enc)
        found = dpc_knn(rows[left.to(rows.device)], n_clusters, self.n_neighbours, inputs.seed)
        centres, owner = left[found.centres.cpu()], found.owner.cpu()
        mass = worth[left].double()
        total = torch.zeros(n_clusters, dtype=torch.float64).index_add(0, owner, mass)[owner]
        size = torch.bincount(owner, minlength=n_clusters)[owner]
        share = torch.where(total > 0, mass / total, 1.0 / size)
        weights = torch.ones(inputs.n).index_copy(0, left, share.float())
        into = torch.arange(inputs.n).index_copy(0, left, centres[owner])
        return select_and_merge(primary, centres, into, weights, inputs.space)


METHOD = VMTC
