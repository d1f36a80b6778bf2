"""Fourier: keep the low frequencies of the picture's features, on a coarser grid.

Source: Wang et al., 2025, arXiv:2508.06038 (Fourier-VLM; released code: whyisverysmart/Fourier-Compressor).
An orthonormal DCT over the token grid, cut to the lowest h x w frequencies, and back on h x w places: a dense, signed
mix of rows. It acts before the projector where the encoder gives such rows, after it where it merges patches.
Departs from it: h x w is the most even grid within the budget (`primitives.lattice`), not a fixed share of each side;
rows are scaled so that a blank picture keeps its values, where the released code multiplies them by sqrt(n / (h w)),
which its checkpoints were trained with (`compat` restores it); and rows take the position of the cell in their middle,
where the paper gives them those of a small picture.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.engine.common.grid import Grid
from foveate.engine.primitives.math import low_pass
from foveate.engine.primitives.ranking import lattice, lattice_cells
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision.inputs import VisualInputs
from foveate.engine.vision.signals import ENC, Signal, Tower
from foveate.engine.vision.transform import TokenTransform


@dataclass(frozen=True, kw_only=True)
class Fourier(Reducer):
    """Looks at nothing: the same mix for every picture of a size. Keeps h * w tokens, maybe fewer than the budget."""

    source: ClassVar[str] = "arXiv:2508.06038"
    group: ClassVar[Group] = "baselines"
    whole_grid: ClassVar[bool] = True

    compat: bool = False  # no rescaling, for checkpoints trained with it

    def needs(self, tower: Tower) -> frozenset[Signal]:
        return frozenset({ENC})

    def count(self, grid: Grid, budget: int) -> int:
        return lattice(grid, min(budget, grid.n_tokens)).n_tokens

    def transform(self, inputs: VisualInputs, k: int) -> TokenTransform:
        grid = inputs.grid
        coarse = lattice(grid, k)
        matrix = torch.kron(low_pass(grid.rows, coarse.rows), low_pass(grid.cols, coarse.cols))
        if not self.compat:
            matrix *= (coarse.n_tokens / grid.n_tokens) ** 0.5
        y = torch.arange(grid.rows) * coarse.rows // grid.rows
        x = torch.arange(grid.cols) * coarse.cols // grid.cols
        back = (y[:, None] * coarse.cols + x).flatten()
        return TokenTransform.dense(matrix, lattice_cells(grid, coarse), back, inputs.space)


METHOD = Fourier
