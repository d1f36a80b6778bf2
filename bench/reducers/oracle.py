"""Oracle: keep the cells that hold something, as a perfect eye would.

The scene itself says which cells hold something. If these cells are too few, random other cells fill the budget. If
they are too many, a random part of them stays. The oracle reads the answer, so it is no method of the product.
`bench.quality` puts this folder into FOVEATE_REDUCERS of its own server.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.bundled.scenes import make_scene, object_cells
from foveate.engine.reduce.base import Reducer
from foveate.engine.vision import VisualInputs


@dataclass(frozen=True, kw_only=True)
class Oracle(Reducer):
    """Needs nothing from the encoder."""

    scene: int = 0  # seed of the scene the picture shows

    def select(self, inputs: VisualInputs, k: int) -> Tensor:
        held = object_cells(make_scene(self.scene), inputs.grid.rows, inputs.grid.cols)
        cells = list(range(inputs.grid.n_tokens))
        random.Random(self.scene).shuffle(cells)
        cells.sort(key=lambda cell: cell not in held)  # stable: random within each half
        return torch.tensor(sorted(cells[:k]))


METHOD = Oracle
