"""CATP, stage 1, against its greedy steps, written out plainly, and against the best subset."""

import dataclasses
from itertools import combinations

import pytest
import torch

from foveate.engine.common import Grid
from foveate.engine.reduce.methods.catp import CATP
from foveate.engine.vision import VisualInputs


def value(inputs: VisualInputs, kept: tuple[int, ...], weight: float) -> float:
    def alike(a: torch.Tensor, b: torch.Tensor) -> float:
        return (float(torch.nn.functional.cosine_similarity(a, b, dim=0)) + 1) / 2

    covered = sum(max(alike(inputs.proj[x], inputs.proj[y]) for y in kept) for x in range(inputs.n)) if kept else 0.0
    if inputs.caption is None or not len(inputs.caption):
        return covered
    return covered + weight * sum(alike(inputs.proj[y], inputs.caption.mean(0)) for y in kept)


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_paper_step_by_step(pictures, seed: int) -> None:
    grid = Grid(2 + seed % 2, 2 + seed % 3)
    inputs = pictures.make(CATP(), grid, "cls", seed=seed)
    k = 1 + seed % (grid.n_tokens - 1)
    kept: tuple[int, ...] = ()
    while len(kept) < k:
        left = [i for i in range(grid.n_tokens) if i not in kept]
        kept += (max(left, key=lambda i: (value(inputs, (*kept, i), 0.7), -i)),)
    assert pictures.kept("catp", inputs, k) == sorted(kept)


def test_without_text_it_is_facility_location_near_the_best(pictures) -> None:
    inputs = pictures.make(CATP(), Grid(3, 3), "cls", seed=4)
    silent = dataclasses.replace(inputs, caption=inputs.proj[:0])
    assert pictures.kept("catp", silent, 3) == pictures.kept("catp", inputs, 3, weight=0.0)
    ours = value(silent, tuple(pictures.kept("catp", silent, 3)), 0.0)
    best = max(value(silent, subset, 0.0) for subset in combinations(range(9), 3))
    assert ours >= (1 - 1 / torch.e) * best


def test_text_draws_what_is_like_it(pictures) -> None:
    inputs = pictures.make(CATP(), Grid(5, 5), "cls", seed=2)
    asked = dataclasses.replace(inputs, caption=inputs.proj[7:8])
    assert pictures.kept("catp", asked, 1, weight=50.0) == [7]
