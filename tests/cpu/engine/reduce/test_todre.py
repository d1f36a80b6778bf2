"""ToDRE against exhaustive greedy choice, and against the best cover."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from foveate.engine.common import Grid
from foveate.engine.reduce.methods.todre import ToDRE

MODES = ["max_sum", "k_center"]


def cosines(proj: Tensor) -> list[list[float]]:
    x = torch.nn.functional.normalize(proj.double(), dim=-1)
    return (x @ x.T).tolist()


def plain(proj: Tensor, k: int, mode: str, attention: list[float] | None) -> list[int]:
    cosine, n = cosines(proj), len(proj)
    if attention is None:
        means = [sum(cosine[i][j] for j in range(n) if j != i) for i in range(n)]
        picks = [means.index(min(means))]
    else:
        picks = [attention.index(max(attention))]
    while len(picks) < k:
        rest = [i for i in range(n) if i not in picks]
        if mode == "max_sum":
            alike = [sum(cosine[i][j] for j in picks) for i in rest]
        else:
            alike = [max(cosine[i][j] for j in picks) for i in rest]
        picks.append(rest[alike.index(min(alike))])
    return sorted(picks)


@pytest.mark.parametrize("start", ["unlike", "attended"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(20))
def test_it_is_exhaustive_greedy(pictures, seed: int, mode: str, start: str) -> None:
    inputs, k = pictures.draw("todre", seed, start=start)
    attention = inputs.saliency().tolist() if start == "attended" else None
    expected = plain(inputs.proj, k, mode, attention)
    assert pictures.kept("todre", inputs, k, mode=mode, start=start) == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(5))
def test_nested_and_blind_to_order(pictures, seed: int, mode: str) -> None:
    inputs = pictures.make(ToDRE(), Grid(3, 4), "no_cls", seed=seed)
    sets = [set(pictures.kept("todre", inputs, k, mode=mode)) for k in range(1, 12)]
    assert all(small < large for small, large in itertools.pairwise(sets))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    shuffled = dataclasses.replace(inputs, proj=inputs.proj[order])
    assert {int(order[i]) for i in pictures.kept("todre", shuffled, 5, mode=mode)} == sets[4]


@pytest.mark.parametrize("seed", range(5))
def test_k_center_covers_within_twice_the_best(pictures, seed: int) -> None:
    inputs = pictures.make(ToDRE(), Grid(2, 5), "no_cls", seed=seed)
    chord = (2 - 2 * torch.tensor(cosines(inputs.proj))).clamp(min=0).sqrt()

    def radius(kept: tuple[int, ...]) -> float:
        return float(chord[:, list(kept)].amin(1).max())

    radii = [radius(tuple(pictures.kept("todre", inputs, k, mode="k_center"))) for k in range(1, 10)]
    assert all(a >= b for a, b in itertools.pairwise(radii))
    for k, mine in enumerate(radii, 1):
        best = min(radius(kept) for kept in itertools.combinations(range(10), k))
        assert mine <= 2 * best + 1e-6


def test_both_modes_begin_alike(pictures) -> None:
    for seed in range(20):
        inputs = pictures.make(ToDRE(), Grid(5, 5), "cls", seed=seed)
        assert pictures.kept("todre", inputs, 2) == pictures.kept("todre", inputs, 2, mode="k_center")
