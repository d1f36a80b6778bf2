"""FlowCut against its steps, written out plainly."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from foveate.engine.common import Grid, saliency, values
from foveate.engine.reduce.methods.flowcut import FlowCut
from foveate.engine.vision import VisualInputs

LAYERS = {"cls": list(range(22)), "no_cls": list(range(25)), "merging": [7, 15, 23], "shallow": [0]}


def plain_score(attention: list[float], v: Tensor) -> list[float]:
    """The scores of the tokens left; `v` is [tokens left, heads, d]."""
    n, n_heads = v.shape[:2]
    share = [a / sum(attention) for a in attention]
    alike = [0.0] * n
    for head in range(n_heads):
        mean = v[:, head].mean(0)
        powers = [math.exp(float(mean @ v[j, head])) for j in range(n)]
        alike = [a + p / sum(powers) / n_heads for a, p in zip(alike, powers, strict=True)]
    length = [float(v[j].mean(0).abs().sum()) for j in range(n)]
    return [(share[j] + alike[j] / sum(alike)) * length[j] for j in range(n)]


def plain(inputs: VisualInputs, layers: list[int], k: int) -> list[list[int]]:
    """The tokens left after each layer."""
    left, so_far, trace = list(range(inputs.n)), {}, []
    for at, layer in enumerate(layers):
        attention = [float(inputs.saliency(layer)[i]) for i in left]
        score = dict(zip(left, plain_score(attention, inputs.values(layer).double()[left]), strict=True))
        so_far = {i: 0.5 * so_far[i] + 0.5 * score[i] if so_far else score[i] for i in left}
        follow, n = len(layers) - 1 - at, len(left)
        if follow % 2 == 0 and n > k:
            p = [a / sum(attention) for a in attention]
            h = -sum(x * math.log(x) for x in p) / math.log(n)
            n_pruned = n - k if follow == 0 else round((n - k) / math.sqrt(follow) * (1 - h**2))
            left = sorted(sorted(left, key=lambda i: (-so_far[i], i))[: max(n - n_pruned, k)])
            so_far = {i: so_far[i] for i in left}
        trace.append(left)
        if len(left) == k:
            break
    return trace


@pytest.mark.parametrize("encoder", ["cls", "merging", "shallow"])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_paper_step_by_step(pictures, seed: int, encoder: str) -> None:
    inputs, k = pictures.draw("flowcut", seed, encoder)
    trace = plain(inputs, LAYERS[encoder], k)
    assert pictures.kept("flowcut", inputs, k) == trace[-1]
    assert all(set(after) <= set(before) for before, after in zip(trace, trace[1:], strict=False))


def test_layers_are_the_papers(pictures) -> None:
    for encoder, layers in LAYERS.items():
        tower = pictures.towers[encoder]
        resolved = {tower.resolve(make(layer)) for layer in layers for make in (saliency, values)}
        assert FlowCut().wanted(tower) == resolved


def test_uniform_attention_prunes_at_the_last_layer_alone(pictures) -> None:
    inputs = pictures.make(FlowCut(), Grid(6, 6), "cls", seed=3)
    even = {s: torch.full((36,), 1 / 40) if s.kind == "cls_row" else t for s, t in inputs.taps.items()}
    inputs = dataclasses.replace(inputs, taps=even)
    total: Tensor | None = None
    for layer in range(22):
        score = torch.tensor(plain_score([1 / 36] * 36, inputs.values(layer).double()))
        total = score if total is None else 0.5 * total + 0.5 * score
    assert total is not None
    assert pictures.kept("flowcut", inputs, 9) == sorted(total.topk(9).indices.tolist())


def test_a_token_that_draws_all_attention_everywhere_is_kept(pictures) -> None:
    inputs = pictures.make(FlowCut(), Grid(6, 6), "cls", seed=4)
    peak = torch.full((36,), 1e-3).index_fill(0, torch.tensor([13]), 0.9)
    taps = {s: peak if s.kind == "cls_row" else t for s, t in inputs.taps.items()}
    assert pictures.kept("flowcut", dataclasses.replace(inputs, taps=taps), 1) == [13]
