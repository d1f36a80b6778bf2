"""GlobalCom2 against its steps, written out plainly on tiled pictures, and the properties of the method."""

import dataclasses
import itertools
import math

import pytest
import torch

from foveate.engine.common import Grid
from foveate.engine.primitives.math import largest_remainder
from foveate.engine.reduce.methods.globalcom2 import GlobalCom2
from foveate.engine.vision import TokenTransform, VisualInputs

GRIDS = [
    Grid(8, 6, thumbnail=4, row_cuts=(0, 4, 8), col_cuts=(0, 3, 6)),
    Grid(8, 5, thumbnail=5, row_cuts=(0, 4, 8), col_cuts=(0, 4, 5)),  # the last column lost padding
    Grid(4, 12, thumbnail=6, row_cuts=(0, 4), col_cuts=(0, 4, 8, 12)),
]


def spans(cuts: tuple[int, ...], side: int, compat: bool) -> list[range]:
    """The rows or columns of the thumbnail that show each row or column of crops."""
    n, m = cuts[-1], len(cuts) - 1
    if compat:
        return [range(i * (side // m), side if i == m - 1 else (i + 1) * (side // m)) for i in range(m)]
    return [range(round(side * a / n), round(side * b / n)) for a, b in itertools.pairwise(cuts)]


def resized(square: list[list[float]], y: int, x: int, rows: int, cols: int) -> float:
    """One cell of a square that is resized bilinearly to rows x cols."""
    side = len(square)
    v, u = (max(0.0, (at + 0.5) * side / n - 0.5) for at, n in ((y, rows), (x, cols)))
    a, b = int(v), int(u)
    c, d = min(a + 1, side - 1), min(b + 1, side - 1)
    above = square[a][b] * (1 - u + b) + square[a][d] * (u - b)
    below = square[c][b] * (1 - u + b) + square[c][d] * (u - b)
    return above * (1 - v + a) + below * (v - a)


def plain(inputs: VisualInputs, k: int, temperature: float, compat: bool) -> list[int]:
    grid, side, scores = inputs.grid, inputs.grid.thumbnail, inputs.saliency().tolist()
    n = side * side
    square = [scores[y * side : (y + 1) * side] for y in range(side)]
    regions = itertools.product(spans(grid.row_cuts, side, compat), spans(grid.col_cuts, side, compat))
    mass = [sum(square[y][x] for y in ys for x in xs) for ys, xs in regions]
    p = [math.exp((m - max(mass)) / temperature) for m in mass]
    p = [value / sum(p) for value in p]
    cuts = itertools.product(itertools.pairwise(grid.row_cuts), itertools.pairwise(grid.col_cuts))
    crops = [[(y, x) for y in range(*rows) for x in range(*cols)] for rows, cols in cuts]
    weights = [len(crop) * (1 + value - sum(p) / len(p)) for crop, value in zip(crops, p, strict=True)]
    first = max(1, n * k // inputs.n)
    kept = sorted(range(n), key=lambda i: (-scores[i], i))[:first]
    for crop, share in zip(crops, largest_remainder(weights, k - first, [len(c) for c in crops]), strict=True):
        own = [scores[n + y * grid.cols + x] for y, x in crop]
        shown = [resized(square, y, x, grid.rows, grid.cols) for y, x in crop]
        score = [a / math.hypot(*own) + g / math.hypot(*shown) for a, g in zip(own, shown, strict=True)]
        best = sorted(range(len(crop)), key=lambda i, score=score: (-score[i], i))[:share]
        kept += [n + crop[i][0] * grid.cols + crop[i][1] for i in best]
    return sorted(kept)


@pytest.mark.parametrize("encoder", ["cls", "merging"])
@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_paper_step_by_step(pictures, seed: int, compat: bool, encoder: str) -> None:
    grid = GRIDS[seed % len(GRIDS)]
    inputs = pictures.make(GlobalCom2(), grid, encoder, seed=seed)
    for temperature in (10.0, 0.1):
        for k in (1, 5, 11 + seed, grid.n_tokens - 1):
            found = pictures.kept("globalcom2", inputs, k, temperature=temperature, compat=compat)
            assert found == plain(inputs, k, temperature, compat)


def with_attention(inputs: VisualInputs, values: torch.Tensor) -> VisualInputs:
    return dataclasses.replace(inputs, taps=dict.fromkeys(inputs.taps, values))


def counts(kept: list[int], grid: Grid) -> list[int]:
    return [len(set(tile.cells()) & set(kept)) for tile in grid.tiles]


def test_crops_that_are_looked_at_alike_keep_alike(pictures) -> None:
    inputs = pictures.make(GlobalCom2(), GRIDS[0], "cls", seed=1)
    level = with_attention(inputs, inputs.saliency().index_fill(0, torch.arange(16), 0.01))
    for temperature in (10.0, 0.01):
        kept = pictures.kept("globalcom2", level, 32, temperature=temperature)
        assert counts(kept, inputs.grid) == [8, 6, 6, 6, 6]
    seen = inputs.saliency().index_fill(0, torch.arange(16), 0.01).index_fill(0, torch.tensor([0, 1, 4, 5]), 0.2)
    found = counts(pictures.kept("globalcom2", with_attention(inputs, seen), 32, temperature=0.1), inputs.grid)
    assert found[0] == 8 and sum(found) == 32
    assert found[1] >= 10 > 5 >= max(found[2:]) and min(found[2:]) >= 4, "21 to 9 of their tokens"


def test_the_scale_of_a_crops_attention_does_not_matter(pictures) -> None:
    inputs = pictures.make(GlobalCom2(), GRIDS[0], "cls", seed=2)
    kept = pictures.kept("globalcom2", inputs, 25)
    for tile in inputs.grid.tiles[1:]:
        factor = torch.ones(inputs.n).index_fill(0, torch.tensor(tile.cells()), 7.0)
        assert pictures.kept("globalcom2", with_attention(inputs, inputs.saliency() * factor), 25) == kept


def test_a_picture_without_tiles_keeps_its_best(pictures) -> None:
    inputs = pictures.make(GlobalCom2(), Grid(6, 7), "cls", seed=1)
    assert pictures.kept("globalcom2", inputs, 9) == pictures.kept("fastervlm", inputs, 9)


def test_rows_that_an_earlier_stage_left(pictures) -> None:
    inputs = pictures.make(GlobalCom2(), GRIDS[0], "cls", seed=3)
    left = torch.arange(0, 64, 3)
    taken = inputs.take(TokenTransform.selection(left, 64))
    for k in range(1, len(left)):
        kept = left[GlobalCom2().reduce(taken, k).anchor]
        assert len(kept) == k and int((kept < 16).sum()) == max(1, 6 * k // 22)
