"""MustDrop's stage at the encoder, written out plainly, and the properties of the method."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from foveate.engine.common import Grid, hidden
from foveate.engine.methods import build_reducer
from foveate.engine.reduce.methods.mustdrop import MustDrop
from foveate.engine.vision import VisualInputs


def plain(inputs: VisualInputs, k: int, threshold: float, compat: bool) -> dict[int, list[int]]:
    """The sources of each output row, by the token whose place the row takes."""
    grid, attention = inputs.grid, inputs.saliency().tolist()
    unit = torch.nn.functional.normalize(inputs.hidden(0.0).double(), dim=-1)
    cosine = (unit @ unit.T).tolist()
    windows = []
    for y, x in itertools.product(range(0, grid.rows - 2, 3), range(0, grid.cols - 2, 3)):
        cells = [(y + a) * grid.cols + x + b for a in range(3) for b in range(3)]
        alike = sum(cosine[i][j] for i, j in itertools.permutations(cells, 2)) / 72
        if alike >= threshold:
            windows.append((-alike, cells))
    members, excess = {i: [i] for i in range(grid.n_tokens)}, grid.n_tokens - k
    for _, cells in sorted(windows):
        loose = sorted(cells, key=lambda i: (-attention[i], i))[max(0, 8 - excess) :]
        if len(loose) > 1:
            y, x = divmod(cells[4], grid.cols)
            near = min(loose, key=lambda i, y=y, x=x: (abs(i // grid.cols - y) + abs(i % grid.cols - x), i))
            members = {i: found for i, found in members.items() if i not in loose}
            members[max(loose) if compat else near] = sorted(loose)
            excess -= len(loose) - 1
    mean = {i: sum(attention[j] for j in found) / len(found) for i, found in members.items()}
    kept = sorted(members, key=lambda i: (-mean[i], i))[:k]
    return {i: members[i] for i in sorted(kept)}


@pytest.mark.parametrize("encoder", ["cls", "merging"])
@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_paper_step_by_step(pictures, seed: int, compat: bool, encoder: str) -> None:
    for threshold in (0.8, 0.0):
        params = {"threshold": threshold, "compat": compat}
        inputs, k = pictures.draw("mustdrop", seed, encoder, **params)
        expected = plain(inputs, k, threshold, compat)
        transform = build_reducer("mustdrop", params).reduce(inputs, k)
        assert transform.anchor.tolist() == list(expected)
        sources = [part.tolist() for part in transform.indices.split(transform.size.tolist())]
        assert sources == list(expected.values())
        before = inputs.proj if inputs.enc is None else inputs.enc
        rows = torch.stack([before[found].mean(0) for found in expected.values()])
        rows = rows if inputs.project is None or inputs.enc is None else inputs.project(rows)
        found = transform.apply_to(inputs.proj, inputs.enc, inputs.project)
        torch.testing.assert_close(found, rows, rtol=1e-4, atol=1e-5)


def with_hidden(inputs: VisualInputs, values: Tensor) -> VisualInputs:
    return dataclasses.replace(inputs, taps={**inputs.taps, inputs.tower.resolve(hidden(0.0)): values})


def test_a_blank_picture_becomes_its_windows(pictures) -> None:
    inputs = pictures.make(MustDrop(), Grid(9, 12), "cls", seed=1)
    inputs = with_hidden(inputs, torch.ones(108, 12))
    for compat, cell in ((False, 13), (True, 26)):
        transform = build_reducer("mustdrop", {"compat": compat}).reduce(inputs, 12)
        assert transform.size.tolist() == [9] * 12
        assert transform.anchor.tolist() == [cell + 36 * y + 3 * x for y in range(3) for x in range(4)]
    for k in range(12, 108):
        assert int(MustDrop().reduce(inputs, k).size.sum()) == 108, "no token is lost"
    assert MustDrop().reduce(inputs, 5).size.tolist() == [9] * 5, "then the least attended windows go"


def test_only_what_is_alike_is_merged(pictures) -> None:
    inputs = pictures.make(MustDrop(), Grid(6, 6), "cls", seed=2)
    values = inputs.hidden(0.0).clone()
    window = [3, 4, 5, 9, 10, 11, 15, 16, 17]
    values[window] = values[3] + 0.01 * values[window]
    transform = MustDrop().reduce(with_hidden(inputs, values), 20)
    merged = transform.size > 1
    assert transform.indices[torch.isin(transform.owner, merged.nonzero()[:, 0])].tolist() in (window, [])
    assert pictures.kept("mustdrop", inputs, 20, threshold=1.01) == pictures.kept("fastervlm", inputs, 20)
