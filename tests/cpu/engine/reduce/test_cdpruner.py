"""CDPruner against brute force: the greedy maximum of the conditional determinant."""

import dataclasses

import pytest
import torch
from torch import Tensor

from foveate.engine.common import Grid
from foveate.engine.reduce.methods.cdpruner import CDPruner


def plain(proj: Tensor, question: Tensor, k: int, weight: float, compat: bool) -> list[int]:
    rows, words = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (proj, question))
    relevance = (rows @ words.T).mean(1) * (-1 if compat else 1)
    relevance = ((relevance - relevance.min()) / (relevance.max() - relevance.min() + 1e-6)) ** weight
    kernel = relevance[:, None] * (rows @ rows.T) * relevance
    picks: list[int] = []
    for _ in range(k):
        rest = [i for i in range(len(rows)) if i not in picks]
        gains = [float(torch.linalg.det(kernel[[*picks, i]][:, [*picks, i]])) for i in rest]
        picks.append(rest[gains.index(max(gains))])
    return sorted(picks)


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_greedy_determinant(pictures, seed: int, compat: bool) -> None:
    inputs, k = pictures.draw("cdpruner", seed)
    k = min(k, 8)  # features have rank 12; rounding hides the determinant of more rows
    for weight in (1.0, 0.5):
        expected = plain(inputs.proj, inputs.question, k, weight, compat)
        assert pictures.kept("cdpruner", inputs, k, weight=weight, compat=compat) == expected


@pytest.mark.parametrize("seed", range(5))
def test_nested_and_blind_to_order(pictures, seed: int) -> None:
    inputs = pictures.make(CDPruner(), Grid(3, 4), "cls", seed=seed)
    sets = [set(pictures.kept("cdpruner", inputs, k)) for k in range(1, 12)]
    assert all(small < large for small, large in zip(sets, sets[1:], strict=False))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    shuffled = dataclasses.replace(inputs, proj=inputs.proj[order])
    assert {int(order[i]) for i in pictures.kept("cdpruner", shuffled, 5)} == sets[4]


def test_the_question_decides_and_no_question_leaves_diversity(pictures) -> None:
    inputs = pictures.make(CDPruner(), Grid(4, 5), "cls", seed=2)
    for token in (3, 11):
        asked = dataclasses.replace(inputs, question=inputs.proj[token : token + 1])
        assert pictures.kept("cdpruner", asked, 1) == [token]
    silent = dataclasses.replace(inputs, question=inputs.proj[:0])
    assert pictures.kept("cdpruner", silent, 7) == pictures.kept("cdpruner", inputs, 7, weight=0.0)
