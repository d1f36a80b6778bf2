"""FoPru's two strategies, written out plainly, and their properties."""

import itertools

import pytest
import torch

from foveate.configs.errors import ConfigError
from foveate.engine.common import Grid
from foveate.engine.reduce.methods.fopru import FoPru
from foveate.engine.vision import TokenTransform


def plain_rank(scores: list[float], k: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


def plain_row(scores: list[float], grid: Grid, k: int) -> list[int]:
    rows = [range(y * grid.cols, (y + 1) * grid.cols) for y in range(grid.rows)]
    kept: list[int] = []
    for row in sorted(rows, key=lambda row: (-sum(scores[i] for i in row), row.start)):
        kept += sorted(row, key=lambda i: (-scores[i], i))[: k - len(kept)]
    return sorted(kept)


@pytest.mark.parametrize("encoder", ["cls", "no_cls", "merging"])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_paper_step_by_step(pictures, seed: int, encoder: str) -> None:
    inputs, k = pictures.draw("fopru", seed, encoder)
    scores = inputs.recv().tolist()
    assert pictures.kept("fopru", inputs, k) == plain_rank(scores, k)
    assert pictures.kept("fopru", inputs, k, order="row") == plain_row(scores, inputs.grid, k)


@pytest.mark.parametrize("order", ["rank", "row"])
@pytest.mark.parametrize("seed", range(5))
def test_kept_sets_are_nested_and_of_whole_rows(pictures, seed: int, order: str) -> None:
    inputs = pictures.make(FoPru(), Grid(5, 6), "cls", seed=seed)
    sets = [set(pictures.kept("fopru", inputs, k, order=order)) for k in range(1, 30)]
    assert all(small < large for small, large in itertools.pairwise(sets))
    if order == "row":
        for n_rows in range(1, 5):
            kept = sets[n_rows * 6 - 1]
            assert len({i // 6 for i in kept}) == n_rows, "rows are whole"
            assert all({y * 6 + x for x in range(6)} <= kept for y in {i // 6 for i in kept})


def test_rows_are_the_pictures_after_an_earlier_stage(pictures) -> None:
    inputs = pictures.make(FoPru(), Grid(4, 5), "cls", seed=4)
    left = [i for i in range(20) if i not in (0, 6, 7, 13)]
    taken = inputs.take(TokenTransform.selection(torch.tensor(left), 20))
    scores = [float(score) if i in left else 0.0 for i, score in enumerate(inputs.recv())]
    for k in (1, 5, 11):
        kept = [left[i] for i in pictures.kept("fopru", taken, k, order="row")]
        in_row = [[i for i in left if i // 5 == y] for y in range(4)]
        best = sorted(in_row, key=lambda row: -sum(scores[i] for i in row))
        expected = [i for row in best for i in sorted(row, key=lambda i: -scores[i])][:k]
        assert kept == sorted(expected)


def test_cls_attention_alone_is_for_encoders_that_have_it(pictures) -> None:
    inputs = pictures.make(FoPru(attention="cls"), Grid(4, 5), "cls", seed=1)
    assert pictures.kept("fopru", inputs, 8, attention="cls") == pictures.kept("fastervlm", inputs, 8)
    with pytest.raises(ConfigError, match="no CLS row"):
        FoPru(attention="cls").wanted(pictures.towers["no_cls"])
