"""HiRED against its steps, written out plainly on tiled pictures, and the properties of the method."""

import dataclasses
import itertools

import pytest
import torch

from foveate.engine.common import Grid, saliency
from foveate.engine.primitives.math import largest_remainder
from foveate.engine.reduce.methods.hired import HiRed
from foveate.engine.vision import TokenTransform, VisualInputs

GRIDS = [
    Grid(8, 6, thumbnail=4, row_cuts=(0, 4, 8), col_cuts=(0, 3, 6)),
    Grid(8, 5, thumbnail=5, row_cuts=(0, 4, 8), col_cuts=(0, 3, 5)),  # the last column lost padding
    Grid(4, 12, thumbnail=6, row_cuts=(0, 4), col_cuts=(0, 4, 8, 12)),
]


def crops_of(grid: Grid) -> list[list[tuple[int, int]]]:
    cuts = itertools.product(itertools.pairwise(grid.row_cuts), itertools.pairwise(grid.col_cuts))
    return [[(y, x) for y in range(*rows) for x in range(*cols)] for rows, cols in cuts]


def plain(inputs: VisualInputs, k: int, alpha: float, compat: bool) -> list[int]:
    grid, side = inputs.grid, inputs.grid.thumbnail
    early, late = inputs.saliency(0.0).tolist(), inputs.saliency().tolist()
    n, crops = side * side, crops_of(grid)
    tiles = [list(range(n)), *([n + y * grid.cols + x for y, x in crop] for crop in crops)]
    first = min(max(int(k * alpha), k - sum(map(len, crops)), 1), n)
    marks = [0] * len(crops)
    for cell in sorted(range(n), key=lambda i: (-early[i], i))[: int(n * (1 - alpha))]:
        y, x = divmod(cell, side)
        for i, crop in enumerate(crops):
            (top, left), (bottom, right) = crop[0], crop[-1]
            down = round(side * top / grid.rows) <= y < round(side * (bottom + 1) / grid.rows)
            across = round(side * left / grid.cols) <= x < round(side * (right + 1) / grid.cols)
            strip = n * i // len(crops) <= cell < n * (i + 1) // len(crops)
            marks[i] += strip if compat else down and across
    shares = [first, *largest_remainder(marks, k - first, [len(crop) for crop in crops])]
    best = [sorted(rows, key=lambda i: (-late[i], i))[:share] for rows, share in zip(tiles, shares, strict=True)]
    return sorted(itertools.chain(*best))


@pytest.mark.parametrize("encoder", ["cls", "merging"])
@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_paper_step_by_step(pictures, seed: int, compat: bool, encoder: str) -> None:
    for alpha in (0.5, 0.2, 1.0):
        grid = GRIDS[seed % len(GRIDS)]
        inputs = pictures.make(HiRed(), grid, encoder, seed=seed)
        for k in (1, 5, 11 + seed, grid.n_tokens - 1):
            found = pictures.kept("hired", inputs, k, alpha=alpha, compat=compat)
            assert found == plain(inputs, k, alpha, compat)


def test_a_picture_without_tiles_keeps_its_best(pictures) -> None:
    inputs = pictures.make(HiRed(), Grid(6, 7), "cls", seed=1)
    assert pictures.kept("hired", inputs, 9) == pictures.kept("fastervlm", inputs, 9)


def test_crops_without_marks_get_nothing_and_the_scale_of_their_attention_does_not_matter(pictures) -> None:
    grid, tower = GRIDS[0], pictures.towers["cls"]
    inputs = pictures.make(HiRed(), grid, "cls", seed=2)
    early, late = (tower.resolve(saliency(layer)) for layer in (0.0, -1))
    upper_left = torch.zeros(inputs.n)
    upper_left[[0, 1, 4, 5, 2]] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])  # the last mark is in the upper right crop
    marked = dataclasses.replace(inputs, taps={**inputs.taps, early: upper_left})
    kept = HiRed(alpha=1 - 5 / 16).reduce(marked, 26).anchor
    crops = [{16 + y * 6 + x for y, x in crop} for crop in crops_of(grid)]
    assert [len(crop & set(kept.tolist())) for crop in crops] == [8, 2, 0, 0]
    for crop in crops:
        factor = torch.ones(inputs.n).index_fill(0, torch.tensor(sorted(crop)), 7.0)
        louder = dataclasses.replace(inputs, taps={**inputs.taps, late: factor * inputs.taps[late]})
        assert pictures.kept("hired", louder, 25) == pictures.kept("hired", inputs, 25)


def test_rows_that_an_earlier_stage_left(pictures) -> None:
    inputs = pictures.make(HiRed(), GRIDS[0], "cls", seed=3)
    left = torch.arange(0, 64, 3)
    taken = inputs.take(TokenTransform.selection(left, 64))
    for k in range(1, len(left)):
        kept = left[HiRed().reduce(taken, k).anchor]
        thumbnail = kept[kept < 16]
        assert len(kept) == k and len(thumbnail) == min(max(k // 2, k - 16, 1), 6)
        best = left[left < 16][inputs.saliency()[left[left < 16]].argsort(descending=True)]
        assert thumbnail.tolist() == sorted(best[: len(thumbnail)].tolist())
