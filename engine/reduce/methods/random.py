"""Random: keep tokens drawn uniformly at random; the baseline that every method has to beat.

The draw is a function of the picture and `seed`, so the same request gives the same answer. Draws are nested: a smaller
budget keeps a subset.
"""

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import VisualInputs


@dataclass(frozen=True, kw_only=True)
class Random(Reducer):
    """Needs nothing from the encoder."""

    group: ClassVar[Group] = "baselines"

    seed: int = 0  # another seed is another draw for the same picture

    def select(self, inputs: VisualInputs, k: int) -> Tensor:
        # Hashed, not added: picture 1 with seed 2 and picture 2 with seed 1 are different draws.
        digest = hashlib.sha256(f"{inputs.seed}/{self.seed}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.randperm(inputs.n, generator=generator)[:k].sort().values


METHOD = Random
