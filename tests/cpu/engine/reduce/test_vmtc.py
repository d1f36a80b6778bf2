"""VMTC against its steps, written out plainly."""

import math

import pytest
import torch
from torch import Tensor

from foveate.engine.common import Grid
from foveate.engine.methods import build_reducer
from foveate.engine.reduce.methods.vmtc import VMTC


def peaks(rows: Tensor, c: int, n_neighbours: int, seed: int) -> tuple[list[int], list[int]]:
    """Density peaks: the centres, and the cluster number of each row."""
    n, width = rows.shape
    apart = ((rows[:, None] - rows).norm(dim=-1) / math.sqrt(width)).tolist()
    noise = (torch.rand(n, generator=torch.Generator().manual_seed(seed)) * 1e-6).tolist()
    density = []
    for i in range(n):
        near = sorted(apart[i])[:n_neighbours]
        density.append(math.exp(-sum(d * d for d in near) / len(near)) + noise[i])
    furthest = max(max(line) for line in apart)
    delta = [min((apart[i][j] for j in range(n) if density[j] > density[i]), default=furthest) for i in range(n)]
    centres = sorted(sorted(range(n), key=lambda i: (-delta[i] * density[i], i))[:c])
    owner = [min(range(c), key=lambda j, i=i: (apart[i][centres[j]], j)) for i in range(n)]
    return centres, [centres.index(i) if i in centres else owner[i] for i in range(n)]


def plain(worth: list[float], rows: Tensor, k: int, ratio: float, kn: int, seed: int) -> tuple[list[int], Tensor]:
    n = len(worth)
    order = sorted(range(n), key=lambda i: (-worth[i], i))
    primary, left = order[: round(k * ratio)], sorted(order[round(k * ratio) :])
    lines = {i: {i: 1.0} for i in primary}
    if len(primary) < k:
        centres, owner = peaks(rows[left].double(), k - len(primary), kn, seed)
        for c, centre in enumerate(centres):
            members = [left[i] for i in range(len(left)) if owner[i] == c]
            total = sum(worth[i] for i in members)
            lines[left[centre]] = {i: worth[i] / total for i in members}
    anchors = sorted(lines)
    matrix = torch.zeros(k, n)
    for row, anchor in enumerate(anchors):
        for i, weight in lines[anchor].items():
            matrix[row, i] = weight
    return anchors, matrix


@pytest.mark.parametrize("encoder", ["cls", "merging"])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_steps(pictures, seed: int, encoder: str) -> None:
    for ratio, kn in ((0.75, 5), (0.2, 3)):
        params = {"primary_ratio": ratio, "n_neighbours": kn}
        inputs, k = pictures.draw("vmtc", seed, encoder, **params)
        transform = build_reducer("vmtc", params).reduce(inputs, k)
        rows = inputs.proj if inputs.enc is None else inputs.enc
        anchors, matrix = plain(inputs.saliency().tolist(), rows, k, ratio, kn, inputs.seed)
        assert transform.anchor.tolist() == anchors
        torch.testing.assert_close(transform.to_matrix(), matrix, rtol=1e-4, atol=1e-6)


def test_without_clusters_it_is_the_most_attended(pictures) -> None:
    inputs = pictures.make(VMTC(), Grid(7, 7), "cls", seed=1)
    for k in (1, 12, 48):
        transform = VMTC(primary_ratio=1.0).reduce(inputs, k)
        assert transform.is_selection
        assert transform.anchor.tolist() == sorted(torch.topk(inputs.saliency(), k).indices.tolist())


def test_every_token_is_in_one_row_and_primary_ones_are_alone(pictures) -> None:
    inputs = pictures.make(VMTC(), Grid(6, 8), "no_cls", seed=2)
    transform = VMTC().reduce(inputs, 20)
    assert sorted(transform.indices.tolist()) == list(range(48)) and int(transform.size.sum()) == 48
    primary = torch.topk(inputs.saliency(), 15).indices.sort().values
    matrix = transform.to_matrix()[transform.back[primary]]
    assert torch.equal(matrix, torch.nn.functional.one_hot(primary, 48).float())
