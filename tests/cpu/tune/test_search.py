"""The search against agreement that is made up: what a monotone one needs is found exactly, and noise never passes."""

import hashlib
import random

import pytest

from foveate.engine.prune.methods.psigmoid import PSigmoid
from foveate.tune.search import LEVELS, fit_sigmoid, gsearch, horizon, least, table_text, with_tail


def needs(seed: int, n_layers: int) -> list[float]:
    """What each layer needs, never growing with depth; the first holds all whatever it needs."""
    rng = random.Random(seed)
    return [1.0, *sorted((rng.choice((rng.random(), 0.0, 1.0)) for _ in range(n_layers - 1)), reverse=True)]


def up(share: float) -> float:
    """To the next level."""
    return -(-share * LEVELS // 1) / LEVELS


@pytest.mark.parametrize("seed", range(30))
def test_a_monotone_need_is_met_exactly(seed: int) -> None:
    n_layers = random.Random(seed).randint(2, 12)
    need, asked = needs(seed, n_layers), []

    def holds(table):
        asked.append(list(table))
        return all(held >= share for held, share in zip(table, need, strict=True))

    assert gsearch(n_layers, 1, holds) == [up(share) for share in need]
    assert len(asked) <= (n_layers - 1) * LEVELS.bit_length()
    assert all(b <= a for table in asked for a, b in zip(table, table[1:], strict=False)), "only legal tables are asked"


@pytest.mark.parametrize("seed", range(10))
def test_at_every_third_layer_a_run_holds_what_its_neediest_does(seed: int) -> None:
    need = needs(seed, 11)
    table = gsearch(11, 3, lambda table: all(a >= b for a, b in zip(table, need, strict=True)))
    assert table == [1.0, *(up(need[1 + (layer - 1) // 3 * 3]) for layer in range(1, 11))]


@pytest.mark.parametrize("seed", range(30))
def test_noise_costs_tokens_and_never_agreement(seed: int) -> None:
    """The answer to a table is drawn from its text, the likelier yes the more it holds; what is found did hold."""
    held = set()

    def holds(table):
        digest = hashlib.sha256(f"{seed} {table_text(table)}".encode()).digest()
        if digest[0] / 256 < sum(table) / len(table):
            held.add(table_text(table))
            return True
        return False

    found = gsearch(6, 1, holds)
    assert table_text(found) in held or found == [1.0] * 6


@pytest.mark.parametrize("most", [1, 2, 7, 32])
def test_bisection_finds_the_first_that_holds(most: int) -> None:
    for first in range(most + 1):
        asked = []
        assert least(most, lambda k, first=first, asked=asked: asked.append(k) or k >= first) == first
        assert len(asked) <= most.bit_length() and most not in asked, "what is known to hold is not asked"
    assert least(most, lambda k: False) == most


@pytest.mark.parametrize("first", [1, 4, 9, 10])
def test_the_horizon_is_the_first_layer_that_needs_nothing(first: int) -> None:
    assert horizon(10, lambda table: table[first - 1] == 1.0) == first


def test_a_tail_replaces_the_deeper_layers() -> None:
    assert with_tail([1.0, 0.5, 0.5, 0.25], 2, 0.125) == [1.0, 0.5, 0.125, 0.125]


@pytest.mark.parametrize(("alpha", "beta"), [(3.0, 0.2), (10.0, 0.4), (25.0, 0.7), (0.0, 0.5)])
def test_a_sigmoid_is_fitted_to_itself(alpha: float, beta: float) -> None:
    table = PSigmoid(alpha=alpha, beta=beta, mean=0.5).table(24)
    fit = fit_sigmoid(table)
    assert fit.mean == pytest.approx(0.5, abs=1e-4)
    assert max(abs(a - b) for a, b in zip(fit.table(24), table, strict=True)) < 0.01


@pytest.mark.parametrize("seed", range(6))
def test_no_sigmoid_of_a_coarse_grid_is_closer(seed: int) -> None:
    table = needs(seed, 8)

    def away(sigmoid: PSigmoid) -> float:
        return sum((a - b) ** 2 for a, b in zip(sigmoid.table(8), table, strict=True))

    fit = fit_sigmoid(table)
    others = [
        PSigmoid(alpha=alpha, beta=beta / 10, mean=fit.mean) for alpha in (0, 2, 5, 10, 20, 40) for beta in range(11)
    ]
    assert fit.mean == pytest.approx(sum(table) / 8, abs=1e-4)
    assert away(fit) <= min(away(other) for other in others) + 1e-3


def test_a_table_as_a_field() -> None:
    assert table_text([1.0, 0.5, 0.03125, 0.0]) == "1,0.5,0.03125,0"
    with pytest.raises(AssertionError, match="never grow"):
        table_text([0.5, 1.0])
