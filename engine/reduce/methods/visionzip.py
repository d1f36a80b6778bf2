"""VisionZip: keep the most attended tokens, and merge the others into a few contextual tokens.

Source: Yang et al., 2024, arXiv:2412.04467 (released code: dvlab-research/VisionZip).
A share of the k tokens is contextual, by default the paper's 10 of 64. Targets are spread evenly over the tokens that
are not dominant. Every other token joins the target with the nearest attention key by cosine.
Departs from the paper: a contextual row is the plain mean of the target and its members. So its norm is that of a
visual token, and a model without training for it reads it correctly. `compat` restores the released target + mean of
members, of weight 2. The paper keeps the CLS row as one of the dominant tokens; here the CLS row is dropped, because it
has no place in the picture. Contextual rows stand where their targets stood, in reading order, not after the dominant
tokens. Rows are mixed before the projector, or after the projector if the encoder merges patches. Without a CLS row,
attention received ranks the tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import ENC, Signal, Tower, signals
from foveate.engine.primitives.ranking import complement, finite, saliency, top
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import TokenTransform, VisualInputs, starts


@dataclass(frozen=True, kw_only=True)
class VisionZip(Reducer):
    """Every source token is in exactly one output row."""

    source: ClassVar[str] = "arXiv:2412.04467"
    group: ClassVar[Group] = "select and merge"

    contextual_ratio: float = 10 / 64  # share of contextual tokens, rounded; 0: selection only
    compat: bool = False  # contextual row = target + mean of its members, as released

    def __post_init__(self) -> None:
        if not 0.0 <= self.contextual_ratio < 1.0:
            raise ConfigError(f"contextual_ratio: {self.contextual_ratio} is not in [0, 1)")

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({signals.saliency(), signals.keys(), ENC})

    def transform(self, inputs: VisualInputs, k: int) -> TokenTransform:
        n_contextual = min(round(k * self.contextual_ratio), k - 1)
        dominant = top(saliency(inputs), k - n_contextual)
        if n_contextual == 0:
            return TokenTransform.selection(dominant, inputs.n)
        anchor, owner = self._clusters(inputs, dominant.cpu(), n_contextual)
        size = torch.bincount(owner, minlength=k)
        indices = torch.sort(owner, stable=True).indices
        weights = 1.0 / size[owner[indices]]
        if self.compat:
            is_anchor = torch.isin(indices, anchor)
            members = (size - 1).clamp(min=1)[owner[indices]]
            weights = torch.where(is_anchor, 1.0, 1.0 / members)
        return TokenTransform(
            n_in=inputs.n,
            indptr=starts(size),
            indices=indices,
            weights=weights,
            anchor=anchor,
            size=size,
            space=inputs.space,
        )

    def _clusters(self, inputs: VisualInputs, dominant: Tensor, n_contextual: int) -> tuple[Tensor, Tensor]:
        """Return the anchors [k], increasing, and the output row of each of the n tokens."""
        n = inputs.n
        keys = torch.nn.functional.normalize(finite("attention keys", inputs.keys()), dim=-1)
        left = complement(dominant, n)
        targets = left[:: len(left) // n_contextual][:n_contextual]
        nearest = (keys[left.to(keys.device)] @ keys[targets.to(keys.device)].T).argmax(1).cpu()
        anchor = torch.cat([dominant, targets]).sort().values
        goes_to = torch.arange(n).index_copy(0, left, targets[nearest])
        goes_to = goes_to.index_copy(0, targets, targets)  # even if a lower index has an identical key
        return anchor, torch.searchsorted(anchor, goes_to)


METHOD = VisionZip
