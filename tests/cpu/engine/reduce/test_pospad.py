"""PosPad: runs of dropped tokens become one row at their end, and the budget is met to the token."""

import random

import pytest
import torch

from foveate.engine.common import Grid
from foveate.engine.reduce.methods.pospad import PosPad, keep_with_runs


def n_rows(kept: list[bool]) -> int:
    return sum(kept) + sum(not now and (i == 0 or kept[i - 1]) for i, now in enumerate(kept))


def plain(order: list[int], k: int) -> list[bool]:
    """From the best down, keep each token that adds a row and leaves at most k rows; then once more."""
    kept = [False] * len(order)
    for _ in range(2):
        for i in order:
            tried = [*kept[:i], True, *kept[i + 1 :]]
            if n_rows(kept) < n_rows(tried) <= k:
                kept = tried
    return kept


@pytest.mark.parametrize("encoder", ["cls", "merging"])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_paper_step_by_step(pictures, seed: int, encoder: str) -> None:
    inputs, k = pictures.draw("pospad", seed, encoder)
    scores = inputs.saliency().tolist()
    kept = plain(sorted(range(inputs.n), key=lambda i: (-scores[i], i)), k)
    source = inputs.proj if inputs.enc is None else inputs.enc
    rows, anchors, run = [], [], []
    for i in range(inputs.n):
        run.append(i)
        if kept[i] or i == inputs.n - 1 or kept[i + 1]:
            rows.append(source[run].mean(0))
            anchors.append(i)
            run = []
    transform = PosPad().reduce(inputs, k)
    assert transform.anchor.tolist() == anchors and transform.size.sum() == inputs.n
    torch.testing.assert_close(transform.mix(source), torch.stack(rows), rtol=1e-4, atol=1e-5)


def test_every_count_can_be_met() -> None:
    rng = random.Random(0)
    for n in (1, 2, 3, 7, 40):
        for k in range(1, n):
            order = rng.sample(range(n), n)
            kept = keep_with_runs(order, k)
            assert n_rows(kept) == k
            runs = [i for i in range(n) if not kept[i] and (i == n - 1 or kept[i + 1])]
            assert all(b - a > 1 for a, b in zip(runs, runs[1:], strict=False)), "no two markers side by side"


def test_one_row_is_the_mean_at_the_end(pictures) -> None:
    inputs = pictures.make(PosPad(), Grid(3, 5), "merging")
    transform = PosPad().reduce(inputs, 1)
    assert transform.anchor.tolist() == [14]
    torch.testing.assert_close(transform.mix(inputs.proj)[0], inputs.proj.mean(0))
