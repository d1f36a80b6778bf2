"""PruMerge against its steps, written out plainly, and the properties of the method."""

import dataclasses

import pytest
import torch
from torch import Tensor

from foveate.engine.common import Grid, cls_cat
from foveate.engine.methods import build_reducer
from foveate.engine.reduce.methods.prumerge import PruMerge
from foveate.engine.vision import VisualInputs


def quartile(values: list[float], share: float) -> float:
    values = sorted(values)
    at = share * (len(values) - 1)
    low, high = values[int(at)], values[min(int(at) + 1, len(values) - 1)]
    return low + (at - int(at)) * (high - low)


def plain_kept(a: list[float], room: int, spatial: bool) -> list[int]:
    q1, q3 = quartile(a, 0.25), quartile(a, 0.75)
    n_outliers = max(1, sum(value > q3 + 1.5 * (q3 - q1) for value in a))
    n_best = min(n_outliers, room) if spatial else room
    best = sorted(range(len(a)), key=lambda i: (-a[i], i))[:n_best]
    others, m = [i for i in range(len(a)) if i not in best], room - n_best
    return sorted([*best, *(others[(2 * j + 1) * len(others) // (2 * m)] for j in range(m))])


def plain(inputs: VisualInputs, k: int, spatial: bool, compat: bool, n_neighbours: int) -> dict[int, Tensor]:
    """The output rows by the token whose place each takes; before the projector if the encoder gives such rows."""
    attention = inputs.cls_cat() if inputs.tower.has_cls else inputs.recv() / inputs.recv().sum()
    a, keys = attention.tolist(), torch.nn.functional.normalize(inputs.keys_cat().double(), dim=-1)
    rows, likeness = (inputs.proj if inputs.enc is None else inputs.enc).double(), (keys @ keys.T).tolist()
    n, kept, out = len(a), plain_kept(a, max(k - 1, 1), spatial), {}
    for i in kept:
        near = sorted((j for j in range(n) if j != i), key=lambda j: (-likeness[i][j], j))[:n_neighbours]
        total = rows[i] + sum(a[j] * rows[j] for j in near)
        out[i] = total if compat else total / (1 + sum(a[j] for j in near))
    if k > 1:
        rest = [j for j in range(n) if j not in kept]
        total = sum((a[j] * rows[j] for j in rest), torch.zeros(rows.shape[1]).double())
        out[max(rest, key=lambda j: (a[j], -j))] = total if compat else total / sum(a[j] for j in rest)
    return out


@pytest.mark.parametrize("encoder", ["cls", "merging"])
@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_paper_step_by_step(pictures, seed: int, compat: bool, encoder: str) -> None:
    for spatial, n_neighbours in ((True, 5), (False, 32)):
        params = {"spatial": spatial, "n_neighbours": n_neighbours, "compat": compat}
        inputs, k = pictures.draw("prumerge", seed, encoder, **params)
        expected = plain(inputs, k, spatial, compat, n_neighbours)
        transform = build_reducer("prumerge", params).reduce(inputs, k)
        assert transform.anchor.tolist() == sorted(expected)
        rows = torch.stack([expected[i] for i in sorted(expected)]).float()
        rows = rows if inputs.project is None or inputs.enc is None else inputs.project(rows)
        found = transform.apply_to(inputs.proj, inputs.enc, inputs.project)
        torch.testing.assert_close(found, rows, rtol=1e-4, atol=1e-5)


def with_attention(inputs: VisualInputs, values: Tensor) -> VisualInputs:
    return dataclasses.replace(inputs, taps={**inputs.taps, inputs.tower.resolve(cls_cat()): values})


def test_outliers_are_kept_and_the_others_spread(pictures) -> None:
    inputs = pictures.make(PruMerge(), Grid(8, 8), "cls", seed=1)
    attention = torch.full((64,), 0.01) + torch.rand(64, generator=torch.Generator().manual_seed(1)) * 1e-3
    attention[[9, 10, 50]] = torch.tensor([0.2, 0.1, 0.05])
    inputs = with_attention(inputs, attention)
    assert PruMerge().kept(attention, 3).tolist() == [9, 10, 50]
    assert PruMerge().kept(attention, 2).tolist() == [9, 10]
    spread = [i for i in PruMerge().kept(attention, 19).tolist() if i not in (9, 10, 50)]
    gaps = torch.tensor(spread).diff()
    assert len(spread) == 16 and gaps.min() >= 3 and gaps.max() <= 6
    transform = PruMerge().reduce(inputs, 20)
    assert {9, 10, 50, *spread} < set(transform.anchor.tolist())
    assert set(transform.indices.tolist()) == set(range(64)), "no token is lost"


def test_without_outliers_one_is_kept_and_the_others_spread(pictures) -> None:
    inputs = with_attention(pictures.make(PruMerge(), Grid(3, 3), "cls", seed=1), torch.full((9,), 0.1))
    assert PruMerge().reduce(inputs, 1).anchor.tolist() == [0]
    assert PruMerge().reduce(inputs, 6).anchor.tolist() == [0, 1, 2, 4, 6, 8]  # 1 is the anchor of the further row


def test_rows_weigh_one_and_released_ones_more(pictures) -> None:
    inputs = pictures.make(PruMerge(), Grid(6, 6), "cls", seed=2)
    own, released = (build_reducer("prumerge", {"compat": compat}).reduce(inputs, 7) for compat in (False, True))
    torch.testing.assert_close(own.to_matrix().sum(1), torch.ones(7))
    kept = PruMerge().kept(inputs.cls_cat(), 6)
    further = ~torch.isin(released.anchor, kept)
    assert int(further.sum()) == 1
    sums, rest = released.to_matrix().sum(1), inputs.cls_cat().sum() - inputs.cls_cat()[kept].sum()
    torch.testing.assert_close(sums[further], rest[None])
    assert (sums[~further] > 1).all()
    torch.testing.assert_close(own.to_matrix() * sums[:, None], released.to_matrix())
