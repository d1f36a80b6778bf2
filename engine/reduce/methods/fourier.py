"""Fourier: keep the low frequencies of the picture's features, on a coarser grid.

Source: Wang et al., 2025, arXiv:2508.06038 (Fourier-VLM; released code: whyisverysmart/Fourier-Compressor).
An orthonormal DCT over the token grid is cut to the lowest h x w frequencies and transformed back onto h x w places.
The result is a dense, signed mix of rows. The mix acts before the projector, or after the projector if the encoder
merges patches.
Departs from the paper: h x w is the most even grid within the budget (`ranking.lattice`), not a fixed share of each
side. Rows are scaled so that a blank picture keeps its values. The released code multiplies the rows by sqrt(n / (h
w)), and its checkpoints were trained with that factor (`compat` restores it). A row takes the position of the cell in
its middle; the paper gives the rows the positions of a small picture.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.engine.common import ENC, Grid, Signal, Tower
from foveate.engine.primitives.math import low_pass
from foveate.engine.primitives.ranking import lattice, lattice_cells
from foveate.engine.reduce.base import Group, Reducer
from foveate.engine.vision import TokenTransform, VisualInputs


@dataclass(frozen=True, kw_only=True)
class Fourier(Reducer):
    """All pictures of one size have the same mix. Keeps h * w tokens, maybe fewer than the budget."""

    source: ClassVar[str] = "arXiv:2508.06038"
    group: ClassVar[Group] = "baselines"
    whole_grid: ClassVar[bool] = True

    compat: bool = False  # no rescaling, for checkpoints trained this way

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
