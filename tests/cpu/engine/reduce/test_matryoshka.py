"""Matryoshka against axes halved by hand, and the properties of its scales."""

import pytest
import torch
from torch import Tensor

from foveate.engine.common import Grid
from foveate.engine.methods import build_reducer
from foveate.engine.reduce.methods.matryoshka import Matryoshka


def halve(axis: list[list[int]]) -> list[list[int]]:
    """Blocks of an axis in pairs; a remaining block joins the last pair."""
    if len(axis) == 1:
        return axis
    pairs = [[*axis[i], *axis[i + 1]] for i in range(0, len(axis) - 1, 2)]
    return [*pairs[:-1], pairs[-1] + axis[-1]] if len(axis) % 2 else pairs


def plain(rows: Tensor, grid: Grid, k: int) -> tuple[Tensor, list[int]]:
    down, across = [[i] for i in range(grid.rows)], [[i] for i in range(grid.cols)]
    while len(down) * len(across) > k:
        down, across = halve(down), halve(across)
    cells = [[y * grid.cols + x for y in ys for x in xs] for ys in down for xs in across]
    anchors = [(ys[0] + len(ys) // 2) * grid.cols + xs[0] + len(xs) // 2 for ys in down for xs in across]
    return torch.stack([rows[block].double().mean(0) for block in cells]).float(), anchors


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_mean_of_blocks_halved_until_they_fit(pictures, seed: int) -> None:
    inputs, k = pictures.draw("matryoshka", seed)
    for budget in (k, 1, inputs.n - 1):
        transform = build_reducer("matryoshka", {}).reduce(inputs, budget)
        rows, anchors = plain(inputs.proj, inputs.grid, budget)
        assert transform.anchor.tolist() == anchors
        torch.testing.assert_close(transform.mix(inputs.proj), rows, rtol=1e-4, atol=1e-5)


def test_a_square_grid_has_the_papers_scales_and_the_last_is_the_mean(pictures) -> None:
    inputs, method = pictures.make(Matryoshka(), Grid(24, 24), "cls", seed=1), Matryoshka()
    assert sorted({method.count(inputs.grid, budget) for budget in range(1, 577)}) == [1, 9, 36, 144, 576]
    channel = inputs.proj[:, 3].view(1, 1, 24, 24)
    for side in (2, 4, 8, 24):
        pooled = method.reduce(inputs, (24 // side) ** 2).mix(inputs.proj)[:, 3]
        expected = torch.nn.functional.avg_pool2d(channel, side).flatten()
        torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [Grid(24, 24), Grid(16, 8), Grid(15, 9), Grid(1, 13)], ids=str)
def test_scales_are_nested(pictures, grid: Grid) -> None:
    inputs, method = pictures.make(Matryoshka(), grid, "cls", seed=2), Matryoshka()
    counts = sorted({method.count(grid, budget) for budget in range(1, grid.n_tokens)}, reverse=True)
    finer = method.reduce(inputs, counts[0])
    for count in counts[1:]:
        coarser = method.reduce(inputs, count)
        assert torch.equal(coarser.size, torch.bincount(coarser.back))
        for block in range(finer.n_out):
            cells = finer.indices[finer.indptr[block] : finer.indptr[block + 1]]
            assert len(coarser.back[cells].unique()) == 1, "a block lies whole in a block of the next scale"
        finer = coarser


def test_a_pool_of_pools_is_the_pool(pictures) -> None:
    inputs, method = pictures.make(Matryoshka(), Grid(16, 16), "cls", seed=3), Matryoshka()
    half = method.reduce(inputs, 64)
    again = pictures.make(Matryoshka(), Grid(8, 8), "cls", seed=3)
    twice = half.then(method.reduce(again, 16))
    torch.testing.assert_close(twice.mix(inputs.proj), method.reduce(inputs, 16).mix(inputs.proj))
