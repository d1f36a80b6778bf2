"""VFlowOpt against its steps, written out plainly."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from foveate.engine.common import Grid
from foveate.engine.methods import build_reducer
from foveate.engine.reduce.methods.vflowopt import VFlowOpt
from foveate.engine.vision import VisualInputs


def plain_entropy(pixels: Tensor, grid: Grid) -> list[float]:
    """Entropy of each cell in bits; the picture's size is a multiple of the grid's size."""
    high, wide = pixels.shape[0] // grid.rows, pixels.shape[1] // grid.cols
    out = []
    for y, x in itertools.product(range(grid.rows), range(grid.cols)):
        cell = pixels[y * high : (y + 1) * high, x * wide : (x + 1) * wide].reshape(-1, 3).tolist()
        greys = [round(sum(colour) / 3) for colour in cell]
        shares = [greys.count(grey) / len(greys) for grey in set(greys)]
        out.append(-sum(p * math.log2(p) for p in shares))
    return out


def plain_importance(inputs: VisualInputs, threshold: float, alpha: float) -> list[float]:
    received = inputs.recv(-1).tolist()
    seen = [j for j, r in enumerate(received) if r > threshold * sum(received) / len(received)]
    importance = received
    if seen:
        attention = inputs.full(-1).tolist()
        importance = [sum(attention[i][j] for i in seen) / len(seen) for j in range(inputs.n)]
    if alpha:
        powers = [math.exp(e) for e in plain_entropy(inputs.pixels, inputs.grid)]
        importance = [a + alpha * p / sum(powers) for a, p in zip(importance, powers, strict=True)]
    return importance


def plain(importance: list[float], grid: Grid, k: int, side: int) -> dict[int, dict[int, float]]:
    """The weights of the tokens of each anchor."""
    n = grid.n_tokens

    def squares(rows: list[int], side: int) -> dict[tuple[int, int], list[int]]:
        found: dict[tuple[int, int], list[int]] = {}
        for i in rows:
            found.setdefault((i // grid.cols // side, i % grid.cols // side), []).append(i)
        return found

    everything = list(range(n))
    while 2 * len(squares(everything, side)) > k and len(squares(everything, side)) > 1:
        side += 1
    worst_first = sorted(everything, key=lambda i: (importance[i], -i))
    sizes = [n - m + len(squares(worst_first[:m], side)) for m in range(n + 1)]
    fitting = [m for m, size in enumerate(sizes) if size == k]
    wanted = n - k + n // side**2
    n_dropped = min(fitting, key=lambda m: abs(m - wanted))
    out = {i: {i: 1.0} for i in worst_first[n_dropped:]}
    for group in squares(worst_first[:n_dropped], side).values():
        best = max(group, key=lambda i: (importance[i], -i))
        out[best] = {i: importance[i] / sum(importance[j] for j in group) for i in group}
    return out


@pytest.mark.parametrize("encoder", ["cls", "merging"])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_paper_step_by_step(pictures, seed: int, encoder: str) -> None:
    for threshold, alpha, side in ((7.0, 0.0, 4), (1.5, 0.0, 2), (3.0, 0.5, 1)):
        params = {"threshold": threshold, "entropy": alpha, "side": side}
        inputs, k = pictures.draw("vflowopt", seed, encoder, **params)
        expected = plain(plain_importance(inputs, threshold, alpha), inputs.grid, k, side)
        transform = build_reducer("vflowopt", params).reduce(inputs, k)
        assert transform.anchor.tolist() == sorted(expected)
        matrix = torch.zeros(k, inputs.n)
        for row, anchor in enumerate(sorted(expected)):
            for i, weight in expected[anchor].items():
                matrix[row, i] = weight
        torch.testing.assert_close(transform.to_matrix(), matrix, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [Grid(9, 7), Grid(8, 5, thumbnail=4, row_cuts=(0, 4, 8), col_cuts=(0, 2, 5))], ids=str)
def test_no_token_is_lost_and_weights_sum_to_1(pictures, grid: Grid) -> None:
    inputs = pictures.make(VFlowOpt(entropy=1.0), grid, "cls", seed=2)
    for k in (1, 2, 3, 9, 30, grid.n_tokens - 1):
        transform = build_reducer("vflowopt", {"entropy": 1.0}).reduce(inputs, k)
        assert (transform.back >= 0).all() and int(transform.size.sum()) == inputs.n
        torch.testing.assert_close(transform.to_matrix().sum(1), torch.ones(k))
        mixed = [set(row.nonzero()[:, 0].tolist()) for row in transform.to_matrix()]
        assert k == 1 or all(max(row) < grid.n_thumbnail or min(row) >= grid.n_thumbnail for row in mixed)


def test_constant_cells_have_no_entropy(pictures) -> None:
    reducer = VFlowOpt(entropy=1.0)
    inputs = pictures.make(reducer, Grid(4, 6), "no_cls", seed=3)
    assert inputs.pixels is not None
    lone = torch.full_like(inputs.pixels, 90)
    lone[8:12, 4:8] = inputs.pixels[8:12, 4:8]  # cell (2, 1)
    flat = reducer.importance(dataclasses.replace(inputs, pixels=torch.full_like(lone, 90)))
    one = reducer.importance(dataclasses.replace(inputs, pixels=lone))
    plain_part = VFlowOpt().importance(inputs)
    torch.testing.assert_close(flat - plain_part, torch.full((24,), 1 / 24))
    assert int((one - plain_part).argmax()) == 2 * 6 + 1


def test_squares_of_the_paper_where_the_budget_has_room(pictures) -> None:
    inputs = pictures.make(VFlowOpt(), Grid(24, 24), "no_cls", seed=4)
    transform = VFlowOpt().reduce(inputs, 144)
    assert int((transform.size > 1).sum()) <= 36 and int(transform.size.max()) <= 16
