"""`largest` and `draw` in C++ against their references: the same tokens, whatever the rows ask for."""

import math

import pytest
import torch
from torch import Tensor

from foveate.kernels.cpu.levels import LEVELS, force, machine
from foveate.kernels.draw import Law, draw
from foveate.kernels.draw import reference as reference_draw
from foveate.kernels.largest import largest
from foveate.kernels.largest import reference as reference_largest

SIZES = (1, 2, 7, 8, 63, 64, 65, 430, 1031, 5003)
has_cpu = pytest.mark.skipif(machine() == LEVELS[0], reason="the C++ kernels are not here")


def scores(seed: int, n: int, shape: str) -> Tensor:
    """[n] float32: peaked, flat, full of ties, all equal, or partly masked."""
    random = torch.Generator().manual_seed(seed)
    row = torch.randn(n, generator=random)
    match shape:
        case "peaked":
            return row * 6
        case "ties":
            return (row * 2).round()
        case "equal":
            return torch.full((n,), 3.25)
        case "masked":
            row[1:][torch.rand(n - 1, generator=random) < 0.5] = -torch.inf
            return row - 1e4
    return row


def laws(seed: int, n: int) -> list[Law]:
    """Every subset of the three cuts, at temperatures from cold to hot."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for subset in range(8):
        u = torch.rand(4, generator=random).tolist()
        key = torch.randint(2**32, (3,), generator=random).tolist()
        found.append(
            Law(
                temperature=0.05 + 2 * u[0] if seed % 5 else 10 ** (-6 + 9 * u[0]),
                top_k=1 + int(u[1] * n) if subset & 1 else 0,
                top_p=0.02 + 0.97 * u[2] if subset & 2 else 1.0,
                min_p=u[3] ** 4 if subset & 4 else 0.0,
                key=(key[0], key[1], key[2]),
            )
        )
    return found


@has_cpu
@pytest.mark.parametrize("shape", ["peaked", "flat", "ties", "equal", "masked"])
@pytest.mark.parametrize("n", SIZES)
def test_draws_are_those_of_the_definition(n: int, shape: str) -> None:
    for seed in range(12):
        row, rules = scores(seed, n, shape), laws(seed + n, n)
        assert draw([row] * 8, rules) == reference_draw([row] * 8, rules), f"seed {seed}, {rules}"


@has_cpu
def test_each_row_is_drawn_by_its_own_law() -> None:
    table = torch.stack([scores(seed, 700, "flat") for seed in range(8)])
    rules = laws(3, 700)
    together = draw(list(table), rules)
    assert together == [draw([row], [rule])[0] for row, rule in zip(table, rules, strict=True)]
    assert together == reference_draw(list(table), rules)


@has_cpu
def test_a_whole_vocabulary() -> None:
    for shape in ("peaked", "flat"):
        row, rules = scores(1, 152_064, shape), laws(1, 152_064)
        assert draw([row] * 8, rules) == reference_draw([row] * 8, rules)


@has_cpu
@pytest.mark.parametrize("n", SIZES)
def test_the_largest_of_equal_ones_is_the_first(n: int) -> None:
    rows = [scores(seed, n, shape) for seed in range(10) for shape in ("peaked", "ties", "equal")]
    assert largest(rows) == reference_largest(rows)
    assert largest([torch.full((n,), -torch.inf)])[1] == [False]


@has_cpu
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_found_wherever_it_is(bad: float) -> None:
    for n in (1, 9, 70, 1000):
        for at in {0, n // 2, n - 1}:
            rows = [scores(at, n, "flat") for _ in range(3)]
            rows[1][at] = bad
            assert largest(rows)[1] == [True, False, True]


@has_cpu
def test_rows_outside_are_not_read() -> None:
    """Views into a table whose other values are NaN."""
    table = torch.full((5, 200), torch.nan)
    table[1:4, 13:90] = torch.stack([scores(seed, 77, "flat") for seed in range(3)])
    views, rules = [table[i, 13:90] for i in (1, 2, 3)], laws(2, 77)[:3]
    assert largest(views) == reference_largest(views)
    assert draw(views, rules) == reference_draw(views, rules)


def test_the_reference_can_be_forced() -> None:
    row, rules = scores(4, 500, "flat"), laws(4, 500)
    with force("reference"):
        assert draw([row] * 8, rules) == reference_draw([row] * 8, rules)
        assert largest([row]) == reference_largest([row])
