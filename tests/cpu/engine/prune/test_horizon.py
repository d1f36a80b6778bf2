"""The random baseline: even, repeatable, nested."""

from dataclasses import replace

import pytest
import torch

from foveate.configs.errors import ConfigError
from foveate.engine.common import Grid
from foveate.engine.prune.methods.horizon import Horizon
from foveate.engine.prune.schedule import Point


def test_every_token_is_as_likely(prompts) -> None:
    """Chi square of 4,000 draws of 9 of 12 tokens. With 11 degrees of freedom, 31.3 has a chance of 0.1 %."""
    probe, n = prompts.make(0, 2, [Grid(3, 4)]).probe, 4_000
    hits = torch.zeros(12)
    for seed in range(n):
        hits[Horizon().select(replace(probe, seed=seed), [9]).keep] += 1
    expected = n * 9 / 12
    chi = float(((hits - expected).square() / (expected * (1 - 9 / 12))).sum()) * 11 / 12
    assert chi < 31.3, f"{hits}"


def test_the_draw_is_of_the_pictures_the_layer_and_the_seed(prompts) -> None:
    case = prompts.make(1, 2, [Grid(6, 6), Grid(6, 6)])
    probe, counts = case.probe, [18, 18]

    def drawn(horizon: Horizon, **other: int) -> list[int]:
        return horizon.select(replace(probe, **other), counts).keep.tolist()

    same = drawn(Horizon())
    assert drawn(Horizon()) == same
    assert same[:18] != [place - 36 for place in same[18:]], "each picture has its own"
    assert same not in (drawn(Horizon(seed=1)), drawn(Horizon(), seed=9), drawn(Horizon(), layer=3))
    assert drawn(Horizon(seed=1), seed=2) != drawn(Horizon(seed=2), seed=1)


@pytest.mark.parametrize("seed", range(20))
def test_counts_are_nested(prompts, seed: int) -> None:
    case = prompts.draw(seed, grids=[Grid(4, 4), Grid(2, 5)])
    sets = [set(prompts.leave("horizon", case, [n, n // 2]).keep.tolist()) for n in range(1, 16)]
    assert all(a < b for a, b in zip(sets, sets[1:], strict=False))


def test_stages_and_the_exit() -> None:
    assert Horizon().points(28) == (Point(14, 0.5), Point(17, 0.25), Point(20, 0.125))
    assert Horizon(exit=0.75).points(28) == (Point(14, 0.5), Point(17, 0.25), Point(20, 0.125), Point(21, 0.0))
    assert Horizon(exit=0.6).points(28) == (Point(14, 0.5), Point(17, 0.0))
    assert Horizon(exit=0.01).points(4) == (Point(1, 0.0),) and Horizon(exit=0.99).points(4) == Horizon().points(4)
    assert Horizon(layers="5,6", shares="0.4,0").points(8) == (Point(5, 0.4), Point(6, 0.0))
    with pytest.raises(ConfigError, match="exit: 0.0"):
        Horizon(exit=0.0)
