"""Points as arithmetic: depths, budgets, tables."""

import random

import pytest

from foveate.configs.errors import ConfigError
from foveate.engine.prune.schedule import (
    Point,
    at_depth,
    checked,
    kept,
    mean_share,
    numbers,
    of_table,
    scaled,
    staged,
    table_of,
)


def test_kept_rounds_down_but_never_to_nothing() -> None:
    assert [kept(10, share) for share in (0.0, 0.01, 0.3, 0.99, 1.0)] == [0, 1, 3, 9, 10]
    assert [kept(n, 0.7) for n in range(5)] == [0, 1, 1, 2, 2]


def test_layers_go_into_any_depth() -> None:
    assert [at_depth(layer, 32, 24) for layer in (1, 8, 16, 24, 31)] == [1, 6, 12, 18, 23]
    assert [at_depth(layer, 32, 2) for layer in (1, 31)] == [1, 1]


def test_of_several_points_at_one_layer_the_last_holds_and_what_changes_nothing_is_none() -> None:
    assert staged([1, 1, 3], [0.5, 0.25, 0.1], 4) == (Point(1, 0.25), Point(3, 0.1))
    assert staged([1, 2, 3], [1.0, 0.5, 0.5], 4) == (Point(2, 0.5),)


@pytest.mark.parametrize(
    ("layers", "shares", "message"),
    [("0,2", "1,0.5", "first layer is 0"), ("2,2", "1,0.5", "ascend"), ("1.5", "1", "whole"), ("nan", "1", "whole"),
     ("2", "1.5", "between 0 and 1"), ("1,2", "0.3,0.5", "falling"), ("1,2", "0.5", "set both"), ("x", "1", "numbers"),
     ("", "0.5", "1 of them for 2")],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(layers: str, shares: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(layers, shares, (8, 16))


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"4 is not in 1..3"):
        staged([4], [0.5], 4)
    assert numbers("layers", "") == []


def table(rng: random.Random) -> list[float]:
    n = rng.randint(2, 40)
    return [1.0, *sorted((rng.choice([rng.random(), 0.0, 1.0]) for _ in range(n - 1)), reverse=True)]


@pytest.mark.parametrize("most", [1, 2, 4, 9])
def test_a_table_in_a_few_points(most: int) -> None:
    for seed in range(100):
        shares = table(random.Random(seed))
        n = len(shares)
        covering, even = (of_table(shares, most, exact_mean=exact) for exact in (False, True))
        assert len(covering) <= most and len(even) <= most
        assert all(a >= b for a, b in zip(table_of(covering, n), shares, strict=True))
        assert bool(covering) == (shares[-1] < 1)
        if even:
            assert mean_share(even, n) == pytest.approx(max(sum(shares) / n, even[0].layer / n), abs=1e-6)
        if len(set(shares) - {1.0}) <= most:
            assert table_of(covering, n) == shares, "few falls are all kept"
            assert table_of(even, n) == pytest.approx(shares)


def test_a_table_of_points_is_what_each_layer_holds() -> None:
    assert table_of([Point(2, 0.5), Point(3, 0.0)], 5) == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert mean_share([Point(2, 0.5), Point(3, 0.0)], 5) == pytest.approx(0.5)


def test_scaled_meets_the_mean() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        n = rng.randint(3, 40)
        layers = sorted(rng.sample(range(1, n), min(n - 1, rng.randint(1, 4))))
        points = staged(layers, sorted((rng.uniform(0.01, 1) for _ in layers), reverse=True), n)
        mean = rng.uniform(layers[0] / n + 1e-3, 0.999)
        assert mean_share(scaled(points, n, mean), n) == pytest.approx(mean, abs=1e-6)
        with pytest.raises(ConfigError, match="hold alone"):
            scaled(points, n, layers[0] / n - 0.01)
        assert scaled(points, n, 1.0) == ()
