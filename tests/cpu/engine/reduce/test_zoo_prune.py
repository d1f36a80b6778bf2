"""ZOO-Prune against its steps, written out plainly, on projectors whose slope is known."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from foveate.engine.common import Grid
from foveate.engine.reduce.methods.zoo_prune import ZooPrune
from foveate.engine.vision import VisualInputs


def plain_sensitivity(inputs: VisualInputs, n_directions: int, step: float) -> list[float]:
    moves = torch.randn(n_directions, inputs.cells.shape[1], generator=torch.Generator().manual_seed(inputs.seed))
    out = []
    for x in inputs.cells.double():
        lengths = [(inputs.project(x + step * u) - inputs.project(x - step * u)).norm() for u in moves.double()]
        out.append(float(sum(lengths)) / n_directions / (2 * step))
    low, high = min(out), max(out)
    return [(s - low) / (high - low + 1e-6) for s in out]


def plain(worth: list[float], proj: Tensor, k: int) -> list[int]:
    x = torch.nn.functional.normalize(proj.double(), dim=-1)
    cosine = (x @ x.T).tolist()
    picks = [worth.index(max(worth))]
    while len(picks) < k:
        rest = [i for i in range(len(worth)) if i not in picks]
        gains = [worth[i] * (1 - max(cosine[i][j] for j in picks)) for i in rest]
        picks.append(rest[gains.index(max(gains))])
    return sorted(picks)


def curved(inputs: VisualInputs, seed: int) -> VisualInputs:
    """The inputs with a projector that is not linear."""
    matrix = torch.randn(inputs.cells.shape[1], 16, generator=torch.Generator().manual_seed(seed)) / 4
    return dataclasses.replace(inputs, project=lambda x: torch.tanh(x @ matrix.to(x.dtype)))


@pytest.mark.parametrize("encoder", ["cls", "merging"])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_paper_step_by_step(pictures, seed: int, encoder: str) -> None:
    for directions, step in ((8, 0.01), (3, 0.1)):
        inputs, k = pictures.draw("zoo_prune", seed, encoder)
        inputs = curved(inputs, seed)
        worth = ZooPrune(directions=directions, step=step).sensitivity(inputs)
        expected = torch.tensor(plain_sensitivity(inputs, directions, step))
        torch.testing.assert_close(worth, expected, rtol=1e-3, atol=1e-3)
        kept = pictures.kept("zoo_prune", inputs, k, directions=directions, step=step)
        assert kept == plain(worth.tolist(), inputs.proj, k)


def test_a_linear_projector_leaves_diversity_whatever_the_step(pictures) -> None:
    for seed in range(5):
        inputs = pictures.make(ZooPrune(), Grid(5, 6), "cls", seed=seed)
        assert ZooPrune().sensitivity(inputs).tolist() == [1.0] * 30
        kept = pictures.kept("zoo_prune", inputs, 9)
        assert kept == plain([1.0] * 30, inputs.proj, 9)
        assert kept == pictures.kept("zoo_prune", inputs, 9, step=0.5, directions=2)
        scaled = dataclasses.replace(inputs, cells=None, project=None)  # LLaVA-OneVision scales projected rows
        assert kept == pictures.kept("zoo_prune", scaled, 9)


def test_a_steeper_place_is_more_sensitive(pictures) -> None:
    inputs = pictures.make(ZooPrune(), Grid(4, 5), "cls", seed=1)
    cubic = dataclasses.replace(inputs, project=lambda x: x**3)  # the slope is 3 x^2
    for token in (2, 13):
        steep = inputs.cells.clone()
        steep[token] *= 4
        sensitivity = ZooPrune().sensitivity(dataclasses.replace(cubic, cells=steep))
        assert int(sensitivity.argmax()) == token and sensitivity[token] > 0.99
        assert token in pictures.kept("zoo_prune", dataclasses.replace(cubic, cells=steep), 1)


def test_narrow_types_rank_as_wide_ones_do(pictures) -> None:
    inputs = pictures.make(ZooPrune(), Grid(6, 6), "cls", seed=2)
    cubic = dataclasses.replace(inputs, cells=inputs.cells.bfloat16().float(), project=lambda x: x**3)
    low = ZooPrune().sensitivity(dataclasses.replace(cubic, cells=cubic.cells.bfloat16()))
    high = ZooPrune().sensitivity(cubic)
    torch.testing.assert_close(low, high, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_nested_and_blind_to_order(pictures, seed: int) -> None:
    inputs = curved(pictures.make(ZooPrune(), Grid(3, 4), "no_cls", seed=seed), seed)
    sets = [set(pictures.kept("zoo_prune", inputs, k)) for k in range(1, 12)]
    assert all(small < large for small, large in itertools.pairwise(sets))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    shuffled = dataclasses.replace(inputs, proj=inputs.proj[order], cells=inputs.cells[order])
    assert {int(order[i]) for i in pictures.kept("zoo_prune", shuffled, 5)} == sets[4]
