"""FlowCut against its steps, written out plainly."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from foveate.engine.common import Grid, Tower, signals
from foveate.engine.models.parts.tower import Taps
from foveate.engine.reduce.methods.flowcut import FlowCut
from foveate.engine.vision import VisualInputs

LAYERS = {"cls": list(range(22)), "no_cls": list(range(25)), "merging": [7, 15, 23], "shallow": [0]}


def plain_score(attention: list[float], v: Tensor, to_cls: Tensor | None = None) -> list[float]:
    """The scores of the tokens left.

    Args:
        v: [tokens left, heads, d].
        to_cls: [1 + tokens left, heads], the products of values with CLS's, its own first; None: there is no CLS row.
    """
    n, n_heads = v.shape[:2]
    share = [a / sum(attention) for a in attention]
    alike = [0.0] * n
    for head in range(n_heads):
        if to_cls is None:
            powers = [math.exp(float(v[:, head].mean(0) @ v[j, head])) for j in range(n)]
            total = sum(powers)
        else:
            powers = [math.exp(float(to_cls[1 + j, head])) for j in range(n)]
            total = sum(powers) + math.exp(float(to_cls[0, head]))
        alike = [a + p / total / n_heads for a, p in zip(alike, powers, strict=True)]
    length = [float(v[j].mean(0).abs().sum()) for j in range(n)]
    return [(share[j] + alike[j] / sum(alike)) * length[j] for j in range(n)]


def plain(inputs: VisualInputs, layers: list[int], k: int) -> list[list[int]]:
    """The tokens left after each layer."""
    left, so_far, trace = list(range(inputs.n)), {}, []
    for at, layer in enumerate(layers):
        attention = [float(inputs.saliency(layer)[i]) for i in left]
        to_cls = None
        if inputs.tower.has_cls:
            to_cls = torch.cat([torch.zeros(1, 2), inputs.cls_values(layer)[left]]).double()
        score = dict(zip(left, plain_score(attention, inputs.values(layer).double()[left], to_cls), strict=True))
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
        kinds = [signals.saliency, signals.values, *([signals.cls_values] if tower.has_cls else [])]
        resolved = {tower.resolve(kind(layer)) for layer in layers for kind in kinds}
        assert FlowCut().wanted(tower) == resolved


def test_uniform_attention_prunes_at_the_last_layer_alone(pictures) -> None:
    inputs = pictures.make(FlowCut(), Grid(6, 6), "cls", seed=3)
    even = {s: torch.full((36,), 1 / 40) if s.kind == "cls_row" else t for s, t in inputs.taps.items()}
    inputs = dataclasses.replace(inputs, taps=even)
    total: Tensor | None = None
    for layer in range(22):
        to_cls = torch.cat([torch.zeros(1, 2), inputs.cls_values(layer)]).double()
        score = torch.tensor(plain_score([1 / 36] * 36, inputs.values(layer).double(), to_cls))
        total = score if total is None else 0.5 * total + 0.5 * score
    assert total is not None
    assert pictures.kept("flowcut", inputs, 9) == sorted(total.topk(9).indices.tolist())


def test_a_token_that_draws_all_attention_everywhere_is_kept(pictures) -> None:
    inputs = pictures.make(FlowCut(), Grid(6, 6), "cls", seed=4)
    peak = torch.full((36,), 1e-3).index_fill(0, torch.tensor([13]), 0.9)
    taps = {s: peak if s.kind == "cls_row" else t for s, t in inputs.taps.items()}
    assert pictures.kept("flowcut", dataclasses.replace(inputs, taps=taps), 1) == [13]


@pytest.mark.parametrize("seed", range(20))
def test_likeness_is_to_the_value_of_the_cls_row_itself(pictures, seed: int) -> None:
    """The authors' score of one layer, from the queries, keys and values [1 + tokens, heads, d] of a tower."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(37, 3, 8, generator=g) for _ in range(3))
    v[0] += 2 * torch.randn(3, 8, generator=g)  # far from the mean value
    tower = Tower(has_cls=True, depth=1)
    taps = Taps(FlowCut().wanted(tower), [0, 37], has_cls=True)
    recorder = taps.at(0)
    assert recorder is not None
    recorder.record_projections(k, v)
    recorder.record_attention(q, k, [0, 37], 8**-0.5)
    attention = torch.einsum("hd,nhd->hn", q[0] * 8**-0.5, k).softmax(-1)[:, 1:].mean(0)
    semantic = torch.einsum("hd,nhd->hn", v[0], v).softmax(-1).mean(0)[1:]
    score = (attention / attention.sum() + semantic / semantic.sum()) * v[1:].mean(1).norm(p=1, dim=-1)
    found = {signal: values[1:] for signal, values in taps.found.items()}
    inputs = VisualInputs(grid=Grid(6, 6), proj=torch.zeros(36, 4), tower=tower, taps=found)
    for k_left in (3, 9, 20):
        assert pictures.kept("flowcut", inputs, k_left) == sorted(score.topk(k_left).indices.tolist())
