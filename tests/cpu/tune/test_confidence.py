"""Exact bounds against the textbook's numbers, against each other and against draws."""

import math
import random
from pathlib import Path

import pytest

from foveate.tune.confidence import (
    allowed_misses,
    chance,
    confirms,
    effective,
    lower_bound,
    pairs_needed,
    pairs_to_confirm,
)
from foveate.tune.data import HELD_OUT_SHARE

WISHES = (0.5, 0.8, 0.9, 0.95, 0.99, 0.999)


@pytest.mark.parametrize(("agreement", "misses", "pairs"), [
    (0.99, 0, 299), (0.99, 1, 473), (0.99, 2, 628), (0.99, 3, 773), (0.95, 0, 59), (0.9, 0, 29), (0.999, 0, 2995),
])  # fmt: skip
def test_the_pairs_that_a_wish_needs(agreement: float, misses: int, pairs: int) -> None:
    assert pairs_needed(agreement, misses) == pairs  # acceptance sampling's tables


@pytest.mark.parametrize("agreement", WISHES)
@pytest.mark.parametrize("risk", [0.05, 0.2])
def test_one_pair_less_or_one_miss_more_does_not_confirm(agreement: float, risk: float) -> None:
    for misses in range(6):
        n = pairs_needed(agreement, misses, risk)
        assert allowed_misses(n, agreement, risk) == misses
        assert allowed_misses(n - 1, agreement, risk) == misses - 1


def test_answers_that_change_together_say_less() -> None:
    assert effective(3, 900, 1.0) == (3, 900) and effective(0, 900, 1.0) == (0, 900)
    assert effective(3, 900, 3.0) == (1, 300), "three changes of one picture are one of a third of the pairs"
    assert effective(4, 900, 1.5) == (3, 600)
    assert confirms(4, 913, 0.99, 1.0) and not confirms(4, 913, 0.99, 1.4)
    assert confirms(0, 299, 0.99, 1.0) and not confirms(0, 299, 0.99, 1.1)


@pytest.mark.parametrize(("same", "n"), [(299, 299), (771, 773), (1, 3), (45, 50), (9_990, 10_000)])
def test_the_bound_is_where_the_chance_is_the_risk(same: int, n: int) -> None:
    bound = lower_bound(same, n)
    assert chance(n - same, n, bound) == pytest.approx(0.05, abs=1e-6)
    assert bound < same / n and lower_bound(0, n) == 0.0


def test_the_chance_is_that_of_draws() -> None:
    rng = random.Random(0)
    drawn = [sum(rng.random() >= 0.97 for _ in range(100)) <= 2 for _ in range(5_000)]
    assert sum(drawn) / len(drawn) == pytest.approx(chance(2, 100, 0.97), abs=0.02)
    assert chance(3, 3, 0.9) == 1.0 and chance(0, 10, 0.9) == pytest.approx(0.9**10)


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.004, 0.006])
def test_the_pairs_that_confirm_a_rate_do(rate: float) -> None:
    pairs = pairs_to_confirm(rate, 0.99)
    assert pairs is not None and rate * pairs <= allowed_misses(pairs, 0.99)
    if rate > 0.001:
        assert rate * (pairs // 2) > allowed_misses(pairs // 2, 0.99), "half of them do not"


@pytest.mark.parametrize("rate", [0.0099, 0.01, 0.5])
def test_a_rate_at_the_wish_is_confirmed_by_no_number_of_pairs(rate: float) -> None:
    assert pairs_to_confirm(rate, 0.99) is None


def test_the_table_of_the_documentation_is_true() -> None:
    text = (Path(__file__).parents[3] / "docs" / "tune.md").read_text()
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| 0.")]
    assert len(rows) >= 5
    for agreement, *held_out, total in rows:
        numbers = [pairs_needed(float(agreement), misses) for misses in (0, 3, 6)]
        assert [int(cell.replace(",", "")) for cell in held_out] == numbers
        stated = [int(cell.replace(",", "")) for cell in total.split(", ")]
        assert stated == [math.ceil(n / HELD_OUT_SHARE - 1e-9) for n in numbers]
