"""Pictures for the reducers: random (or constant) features with exactly the signals that a reducer asks for.

Test modules cannot import each other (importmode is importlib), so the helpers come as one fixture:

    def test_x(pictures):
        inputs = pictures.make(reducer, Grid(6, 6), "cls", seed=3)
        inputs, k = pictures.draw("hiprune", seed)      # a picture of random size, and a budget
        kept = pictures.kept("hiprune", inputs, k, alpha=0.2)
"""

import random

import pytest
import torch
from torch import Tensor

from foveate.engine.common import CAPTION, CELLS, ENC, PIXELS, QUESTION, Grid, Signal, Tower
from foveate.engine.methods import build_reducer
from foveate.engine.reduce.base import Reducer
from foveate.engine.vision import VisualInputs

torch.set_num_threads(1)
WIDTH, OUT, HEADS, HEAD_DIM, CELL_PIXELS = 12, 40, 2, 4, 4
TOWERS = {
    "cls": Tower(has_cls=True, depth=23),  # LLaVA-1.5's
    "no_cls": Tower(has_cls=False, depth=26),  # SigLIP's
    "merging": Tower(has_cls=False, depth=32, merges=True, full_layers=(7, 15, 23, 31)),  # Qwen2.5-VL's
    "shallow": Tower(has_cls=True, depth=1),
}
Value = bool | int | float | str
Group = tuple[int, set[int]]  # the anchor of an output row, and the tokens in the row


def _prepared(grid: Grid) -> tuple[int, int]:
    """Height and width in pixels of the prepared picture; tiles lie one above the other."""
    if not grid.thumbnail:
        return grid.rows * CELL_PIXELS, grid.cols * CELL_PIXELS
    side, n_crops = grid.thumbnail * CELL_PIXELS, (len(grid.row_cuts) - 1) * (len(grid.col_cuts) - 1)
    return side * (1 + n_crops), side


class Pictures:
    towers = TOWERS

    def fits(self, reducer: Reducer, encoder: str) -> bool:
        return reducer.fits in ("any", "tiles", "cls" if TOWERS[encoder].has_cls else "no_cls")

    def make(
        self, reducer: Reducer, grid: Grid, encoder: str, *, fill: float | None = None, seed: int = 0, n_words: int = 5
    ) -> VisualInputs:
        """One picture. `fill` makes all features of the picture and of the text constant."""
        tower = TOWERS[encoder]
        return self.of_signals(reducer.wanted(tower), grid, tower, fill=fill, seed=seed, n_words=n_words)

    def of_signals(
        self,
        wanted: frozenset[Signal],
        grid: Grid,
        tower: Tower,
        *,
        fill: float | None = None,
        seed: int = 0,
        n_words: int = 5,
    ) -> VisualInputs:
        g = torch.Generator().manual_seed(seed)

        def rows(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g) if fill is None else torch.full(shape, fill)

        n, patches = grid.n_tokens, 4 if tower.merges else 1
        before = rows(n, WIDTH * patches)
        matrix = torch.randn(WIDTH * patches, OUT, generator=torch.Generator().manual_seed(1)) / WIDTH
        shapes = {"keys": (n, HEAD_DIM), "keys_cat": (n, HEADS * HEAD_DIM), "values": (n, HEADS, HEAD_DIM)}
        shapes |= {"hidden": (n, WIDTH), "qk": (2, n + tower.has_cls, patches, HEADS, HEAD_DIM)}
        shapes |= {"logits": (n,), "cls_values": (n, HEADS)}
        taps = {
            s: rows(*shapes[s.kind]) if s.kind in shapes else rows(n).softmax(0)
            for s in sorted(wanted, key=str)
            if s.kind in shapes or s.kind in ("cls_row", "cls_cat", "recv")
        }
        enc = ENC in wanted and not tower.merges
        pixels = torch.randint(0, 256, (*_prepared(grid), 3), generator=g)
        return VisualInputs(
            grid=grid,
            proj=before @ matrix,
            tower=tower,
            taps=taps,
            enc=before if enc else None,
            cls=rows(WIDTH) if enc and tower.has_cls else None,
            cells=before if CELLS in wanted else None,
            project=(lambda x: x @ matrix.to(x.dtype)) if enc or CELLS in wanted else None,
            question=rows(n_words, OUT) if QUESTION in wanted else None,
            caption=rows(n_words, OUT) if CAPTION in wanted else None,
            pixels=(pixels if fill is None else pixels * 0 + 127).to(torch.uint8) if PIXELS in wanted else None,
            seed=seed,
        )

    def draw(self, name: str, seed: int, encoder: str = "cls", **params: Value) -> tuple[VisualInputs, int]:
        """A picture of random size for a method, and a budget below the picture's tokens."""
        rng = random.Random(seed)
        grid = Grid(rng.randint(2, 9), rng.randint(2, 9))
        inputs = self.make(build_reducer(name, params), grid, encoder, seed=seed)
        return inputs, rng.randint(1, grid.n_tokens - 1)

    def kept(self, name: str, inputs: VisualInputs, k: int, **params: Value) -> list[int]:
        """The tokens that the method keeps."""
        return build_reducer(name, params).reduce(inputs, k).anchor.tolist()

    def merged(self, name: str, inputs: VisualInputs, k: int, **params: Value) -> tuple[list[Group], Tensor]:
        """A method's output rows in order: the anchor and the sources of each row; and the rows."""
        transform = build_reducer(name, params).reduce(inputs, k)
        sources = [set(part.tolist()) for part in transform.indices.split(transform.size.tolist())]
        rows = transform.apply_to(inputs.proj, inputs.enc, inputs.project)
        return list(zip(transform.anchor.tolist(), sources, strict=True)), rows

    def as_merged(
        self, inputs: VisualInputs, by_anchor: dict[int, tuple[set[int], Tensor]]
    ) -> tuple[list[Group], Tensor]:
        """The same for a plain version, which gives the sources and the row before the projector by anchor."""
        rows = torch.stack([row for _, (_, row) in sorted(by_anchor.items())]).float()
        rows = rows if inputs.project is None or inputs.enc is None else inputs.project(rows)
        return [(anchor, sources) for anchor, (sources, _) in sorted(by_anchor.items())], rows


@pytest.fixture
def pictures() -> Pictures:
    return Pictures()
