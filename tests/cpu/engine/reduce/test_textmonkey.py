"""TextMonkey's filter against its definition, and its properties."""

import dataclasses

import pytest
import torch
from torch import Tensor

from foveate.engine.common import Grid
from foveate.engine.methods import build_reducer
from foveate.engine.reduce.methods.textmonkey import TextMonkey


def plain(rows: Tensor, k: int) -> list[int]:
    n = len(rows)
    rows = torch.nn.functional.normalize(rows.double(), dim=-1)
    cosine = (rows @ rows.T).tolist()
    alike = [max(cosine[i][i + 1 :], default=-1.0) for i in range(n)]
    alike[-1] = -2.0  # below any cosine
    return sorted(sorted(range(n), key=lambda i: (alike[i], i))[:k])


@pytest.mark.parametrize("encoder", ["cls", "merging"])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_definition(pictures, seed: int, encoder: str) -> None:
    inputs, k = pictures.draw("textmonkey", seed, encoder)
    rows = inputs.proj if inputs.enc is None else inputs.enc
    assert pictures.kept("textmonkey", inputs, k) == plain(rows, k)


@pytest.mark.parametrize("seed", range(5))
def test_a_tiled_picture_is_its_thumbnail_and_all_crops_together(pictures, seed: int) -> None:
    grid = Grid(8, 6, thumbnail=4, row_cuts=(0, 4, 8), col_cuts=(0, 3, 6))
    inputs = pictures.make(TextMonkey(), grid, "cls", seed=seed)
    rows = inputs.enc
    for k in (1, 2, 9, 30, 60, 63):
        for ratio in (0.0, 1 / 3, 1.0):
            of_thumbnail = max(min(16, round(k * ratio)), k - 48)
            thumbnail = plain(rows[:16], of_thumbnail)
            crops = [16 + i for i in plain(rows[16:], k - of_thumbnail)]
            assert pictures.kept("textmonkey", inputs, k, thumbnail_ratio=ratio) == [*thumbnail, *crops]


def test_of_copies_the_last_stays_and_the_last_token_always(pictures) -> None:
    inputs = pictures.make(TextMonkey(), Grid(6, 6), "cls", seed=3)
    enc = inputs.enc.clone()
    for earlier, later in ((2, 20), (5, 35), (11, 12)):
        enc[earlier] = 3.0 * enc[later]  # cosine 1: the norm does not matter
    copied = dataclasses.replace(inputs, enc=enc)
    kept = pictures.kept("textmonkey", copied, 33)
    assert kept == [i for i in range(36) if i not in (2, 5, 11)]
    assert all(35 in pictures.kept("textmonkey", copied, k) for k in range(1, 36))


def test_kept_sets_are_nested(pictures) -> None:
    inputs = pictures.make(TextMonkey(), Grid(5, 7), "no_cls", seed=4)
    sets = [set(pictures.kept("textmonkey", inputs, k)) for k in range(1, 35)]
    assert all(small < large for small, large in zip(sets, sets[1:], strict=False))


def test_what_is_left_of_a_thumbnail_is_still_one(pictures) -> None:
    grid = Grid(4, 4, thumbnail=2, row_cuts=(0, 2, 4), col_cuts=(0, 2, 4))
    inputs = pictures.make(TextMonkey(), grid, "cls", seed=5)
    first = build_reducer("random", {}).reduce(inputs, 14)
    left = inputs.take(first)
    n_thumbnail = sum(i < 4 for i in first.anchor.tolist())
    of_thumbnail = max(min(n_thumbnail, round(9 / 3)), 9 - (14 - n_thumbnail))
    expected = plain(left.enc[:n_thumbnail], of_thumbnail)
    expected += [n_thumbnail + i for i in plain(left.enc[n_thumbnail:], 9 - of_thumbnail)]
    assert TextMonkey().reduce(left, 9).anchor.tolist() == expected
