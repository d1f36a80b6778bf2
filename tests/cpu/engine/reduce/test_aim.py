"""AIM against its passes, written out plainly, and the properties of its merges."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from foveate.engine.common import Grid
from foveate.engine.methods import build_reducer
from foveate.engine.reduce.methods.aim import AIM


@dataclass
class Row:
    anchor: int
    share: dict[int, float]  # weight of each token
    at: Tensor


def one_pass(rows: list[Row], k: int, weighted: bool, compat: bool) -> list[Row]:
    unit = torch.nn.functional.normalize(torch.stack([row.at for row in rows]), dim=-1)
    cosine = (unit @ unit.T).tolist()
    n = len(rows)
    close: dict[int, tuple[float, int]] = {}
    for a in range(0, n, 2):
        cosines = [(cosine[a][b], b) for b in range(1, n, 2)]
        close[a] = max(cosines, key=lambda found: (found[0], -found[1]))
    ranked = sorted(close, key=lambda a: (-close[a][0], a))
    gone, stays = ranked[: min(n // 2, n - k)], ranked[min(n // 2, n - k) :]
    out = {a: rows[a] for a in stays}
    for b in range(1, n, 2):
        group = [rows[b], *(rows[a] for a in gone if close[a][1] == b)]
        mass = [len(row.share) if weighted else 1 for row in group]
        share = {i: w * m / sum(mass) for row, m in zip(group, mass, strict=True) for i, w in row.share.items()}
        at = sum(row.at * m for row, m in zip(group, mass, strict=True)) / sum(mass)
        out[b] = Row(rows[b].anchor, share, at)
    return [out[i] for i in ([*stays, *range(1, n, 2)] if compat else sorted(out))]


def plain(proj: Tensor, k: int, weighted: bool, compat: bool) -> tuple[list[int], Tensor]:
    rows = [Row(i, {i: 1.0}, row) for i, row in enumerate(proj.double())]
    while len(rows) > k:
        rows = one_pass(rows, k, weighted, compat)
    rows = sorted(rows, key=lambda row: row.anchor)
    matrix = torch.zeros(k, len(proj))
    for r, row in enumerate(rows):
        for i, weight in row.share.items():
            matrix[r, i] = weight
    return [row.anchor for row in rows], matrix


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_paper_step_by_step(pictures, seed: int, weighted: bool, compat: bool) -> None:
    inputs, k = pictures.draw("aim", seed)
    transform = build_reducer("aim", {"weighted": weighted, "compat": compat}).reduce(inputs, k)
    anchors, matrix = plain(inputs.proj, k, weighted, compat)
    assert transform.anchor.tolist() == anchors
    torch.testing.assert_close(transform.to_matrix(), matrix, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 7, 24, 47])
def test_every_token_is_in_one_row_and_weighted_rows_are_plain_means(pictures, k: int) -> None:
    inputs = pictures.make(AIM(), Grid(6, 8), "cls", seed=k)
    transform = AIM(weighted=True).reduce(inputs, k)
    assert sorted(transform.indices.tolist()) == list(range(48)) and int(transform.size.sum()) == 48
    assert transform.weights is not None
    torch.testing.assert_close(transform.weights, 1.0 / transform.size[transform.owner])


def test_a_pass_leaves_at_least_half_and_the_last_may_leave_any_number(pictures) -> None:
    inputs = pictures.make(AIM(), Grid(14, 14), "cls", seed=3)
    half, three_eighths = AIM().reduce(inputs, 98), AIM().reduce(inputs, 74)
    assert half.anchor.tolist() == list(range(1, 196, 2)), "all even rows merge into odd ones"
    assert set(three_eighths.anchor.tolist()) < set(half.anchor.tolist())
    rows = half.mix(inputs.proj)
    after = AIM().reduce(dataclasses.replace(inputs, grid=Grid(7, 14), proj=rows), 74)
    torch.testing.assert_close(half.then(after).mix(inputs.proj), three_eighths.mix(inputs.proj), rtol=1e-4, atol=1e-5)


def test_identical_tokens_merge_first(pictures) -> None:
    inputs = pictures.make(AIM(), Grid(5, 8), "merging", seed=4)
    copies = {4: 9, 18: 3, 30: 31}  # even: odd
    proj = inputs.proj.clone()
    for even, odd in copies.items():
        proj[even] = proj[odd]
    transform = AIM().reduce(dataclasses.replace(inputs, proj=proj), 37)
    assert sorted(transform.anchor.tolist()) == [i for i in range(40) if i not in copies]
    torch.testing.assert_close(transform.mix(proj), proj[transform.anchor])
