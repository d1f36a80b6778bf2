"""MMTok against greedy coverage, written out plainly, and against the best cover."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from foveate.engine.common import Grid
from foveate.engine.reduce.methods.mmtok import MMTok
from foveate.engine.vision import VisualInputs


def plain_worth(inputs: VisualInputs, alpha: float) -> Tensor:
    proj, words, seen = (
        torch.nn.functional.normalize(x.double(), dim=-1) for x in (inputs.proj, inputs.question, inputs.hidden())
    )
    rows = []
    for word in words:
        powers = [math.exp(float(word @ x) / 0.02) for x in proj]
        rows.append([p / sum(powers) / len(words) for p in powers])
    for token in seen:
        powers = [math.exp(float(token @ x) / 0.2) for x in seen]
        rows.append([alpha * p / sum(powers) / len(seen) for p in powers])
    return torch.tensor(rows, dtype=torch.float64)


def plain(worth: Tensor, k: int) -> tuple[list[int], list[float]]:
    best, picks, gains = worth.new_zeros(len(worth)), [], []
    for _ in range(k):
        gain = [float((column - best).clamp(min=0).sum()) for column in worth.T]
        pick = max((j for j in range(len(gain)) if j not in picks), key=lambda j: (gain[j], -j))
        picks.append(pick)
        gains.append(gain[pick])
        best = torch.maximum(best, worth[:, pick])
    return picks, gains


@pytest.mark.parametrize("encoder", ["cls", "merging"])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_greedy_coverage(pictures, seed: int, encoder: str) -> None:
    inputs, k = pictures.draw("mmtok", seed, encoder)
    k = min(k, 12)
    for alpha in (0.5, 0.05):
        picks, gains = plain(plain_worth(inputs, alpha), k)
        assert pictures.kept("mmtok", inputs, k, alpha=alpha) == sorted(picks)
        assert all(a >= b - 1e-12 for a, b in itertools.pairwise(gains)), "gains never grow"


@pytest.mark.parametrize("seed", range(5))
def test_it_comes_near_the_best_cover(pictures, seed: int) -> None:
    inputs = pictures.make(MMTok(), Grid(3, 3), "cls", seed=seed)
    worth = MMTok().worth(inputs)
    torch.testing.assert_close(worth, plain_worth(inputs, 0.5).float(), rtol=1e-4, atol=1e-6)

    def covered(kept: tuple[int, ...]) -> float:
        return float(worth[:, list(kept)].amax(1).sum())

    for k in (1, 2, 4):
        best = max(covered(kept) for kept in itertools.combinations(range(9), k))
        mine = covered(tuple(pictures.kept("mmtok", inputs, k)))
        assert mine >= (1 - 1 / math.e) * best
        assert k > 1 or mine == pytest.approx(best)


def test_the_question_decides_and_without_one_the_picture_is_covered(pictures) -> None:
    inputs = pictures.make(MMTok(), Grid(5, 6), "cls", seed=2)
    for token in (3, 17):
        asked = dataclasses.replace(inputs, question=inputs.proj[token : token + 1])
        assert token in pictures.kept("mmtok", asked, 3)
    silent = dataclasses.replace(inputs, question=inputs.proj[:0])
    expected = plain(plain_worth(silent, 0.5), 7)[0]
    assert pictures.kept("mmtok", silent, 7) == sorted(expected)


def test_kept_sets_are_nested_and_blind_to_order(pictures) -> None:
    inputs = pictures.make(MMTok(), Grid(4, 5), "cls", seed=3)
    sets = [set(pictures.kept("mmtok", inputs, k)) for k in range(1, 20)]
    assert all(small < large for small, large in itertools.pairwise(sets))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    taps = {signal: rows[order] for signal, rows in inputs.taps.items()}
    shuffled = dataclasses.replace(inputs, proj=inputs.proj[order], taps=taps)
    assert {int(order[i]) for i in pictures.kept("mmtok", shuffled, 6)} == sets[5]
