"""HiPrune against its steps, written out plainly."""

import pytest
import torch

from foveate.engine.common import Grid
from foveate.engine.reduce.methods.hiprune import HiPrune


def plain(middle: list[float], deep: list[float], grid: Grid, k: int, alpha: float, compat: bool) -> list[int]:
    n = grid.n_tokens
    anchors = sorted(range(n), key=lambda i: (-middle[i], i))[: round(k * alpha / 5)]
    found = set(anchors)
    for i in anchors:
        y, x = divmod(i, grid.cols)
        if compat:
            found |= {min(max(j, 0), n - 1) for j in (i - 1, i + 1, i - grid.cols, i + grid.cols)}
        else:
            steps = ((y, x - 1), (y, x + 1), (y - 1, x), (y + 1, x))
            found |= {v * grid.cols + u for v, u in steps if 0 <= v < grid.rows and 0 <= u < grid.cols}
    kept = sorted(found, key=lambda i: (i not in anchors, -middle[i], i))[:k]
    rest = sorted((i for i in range(n) if i not in kept), key=lambda i: (-deep[i], i))
    return sorted([*kept, *rest[: k - len(kept)]])


@pytest.mark.parametrize("encoder", ["cls", "merging"])
@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_paper_step_by_step(pictures, seed: int, compat: bool, encoder: str) -> None:
    for alpha in (0.1, 0.5, 1.0):
        inputs, k = pictures.draw("hiprune", seed, encoder, alpha=alpha)
        signals = inputs.recv(0.36).tolist(), inputs.recv(-1).tolist()
        expected = plain(*signals, inputs.grid, k, alpha, compat)
        assert pictures.kept("hiprune", inputs, k, alpha=alpha, compat=compat) == expected


def test_layers_are_the_papers(pictures) -> None:
    llava, qwen = pictures.towers["cls"], pictures.towers["merging"]
    assert {s.layer for s in HiPrune().wanted(llava)} == {8, 22}
    assert {s.layer for s in HiPrune(object_layer=0.48).wanted(qwen)} == {15, 31}


def test_anchors_bring_their_neighbours_and_alpha_0_is_the_deep_layer_alone(pictures) -> None:
    inputs = pictures.make(HiPrune(), Grid(12, 12), "cls", seed=1)
    middle, deep = inputs.recv(0.36), inputs.recv(-1)
    kept = pictures.kept("hiprune", inputs, 100, alpha=0.5)
    for anchor in torch.topk(middle, 10).indices.tolist():
        y, x = divmod(anchor, 12)
        around = ((y, x), (y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
        assert {v * 12 + u for v, u in around if 0 <= v < 12 and 0 <= u < 12} <= set(kept)
    assert pictures.kept("hiprune", inputs, 40, alpha=0.0) == sorted(torch.topk(deep, 40).indices.tolist())
