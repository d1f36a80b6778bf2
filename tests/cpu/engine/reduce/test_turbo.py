"""Turbo against its passes, written out plainly, and its properties."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import Grid
from foveate.engine.methods import build_reducer
from foveate.engine.primitives.merge import bipartite, merge_into
from foveate.engine.reduce.methods.turbo import Turbo
from foveate.engine.vision import VisualInputs

Value = bool | int | float


def plain(inputs: VisualInputs, k: int, n_layers: int, weights: list[float], compat: bool) -> dict[int, list[int]]:
    """The tokens of each row, by anchor. `weights`: of attention against cosine, one for each layer."""
    clusters = {i: [i] for i in range(inputs.n)}
    step = 0
    while len(clusters) > k:
        at = min(step, n_layers - 1)
        layer = (at + 1) / n_layers
        attention: Tensor = inputs.saliency(layer).double()
        if not compat:
            attention = attention / attention.mean() / 576
        anchors, n = sorted(clusters), len(clusters)
        keys = torch.stack([inputs.keys(layer)[clusters[a]].double().mean(0) for a in anchors])
        keys = torch.nn.functional.normalize(keys, dim=-1)
        cosine = (keys @ keys.T).tolist()
        close = {}
        for a in range(0, n, 2):
            cosines = [(cosine[a][b], -b) for b in range(1, n, 2)]
            best, partner = max(cosines)
            close[a] = (best - weights[at] * float(attention[clusters[anchors[a]]].sum()), -partner)
        each = math.ceil((n - k) / max(1, n_layers - step))
        for a in sorted(close, key=lambda a: (-close[a][0], a))[: min(each, n // 2)]:
            clusters[anchors[close[a][1]]] += clusters.pop(anchors[a])
        step += 1
    return {anchor: sorted(clusters[anchor]) for anchor in sorted(clusters)}


def clusters_of(inputs: VisualInputs, k: int, **params: Value) -> dict[int, list[int]]:
    transform = build_reducer("turbo", params).reduce(inputs, k)
    ends = zip(transform.indptr.tolist(), transform.indptr.tolist()[1:], strict=False)
    members = [transform.indices[start:end].tolist() for start, end in ends]
    return dict(zip(transform.anchor.tolist(), members, strict=True))


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_paper_step_by_step(pictures, seed: int, compat: bool) -> None:
    for alpha, beta, gamma, n_layers in ((1.0, 1.0, 0, 4), (5.0, 0.9, 10, 2)):
        params: dict[str, Value] = {"alpha": alpha, "beta": beta, "gamma": gamma, "n_layers": n_layers}
        inputs, k = pictures.draw("turbo", seed, ("cls", "merging")[seed % 2], **params)
        layers = [inputs.tower.layer((i + 1) / n_layers) for i in range(n_layers)]
        weights = [30 * alpha * beta ** abs(gamma - layer) for layer in layers]
        assert clusters_of(inputs, k, compat=compat, **params) == plain(inputs, k, n_layers, weights, compat)


@pytest.mark.parametrize("k", [24, 30, 47])
def test_alpha_0_is_tome_bit_for_bit(pictures, k: int) -> None:
    inputs = pictures.make(Turbo(n_layers=1), Grid(6, 8), "cls", seed=k)
    turbo = Turbo(alpha=0.0, n_layers=1).reduce(inputs, k)
    tome = merge_into(bipartite(inputs.keys(-1), 48 - k), space="enc")
    for field in ("indptr", "indices", "weights", "anchor", "size", "back"):
        assert torch.equal(getattr(turbo, field), getattr(tome, field))


def test_a_large_alpha_merges_the_least_attended(pictures) -> None:
    inputs = pictures.make(Turbo(n_layers=1), Grid(6, 8), "no_cls", seed=5)
    attention = 1.0 + torch.randperm(48, generator=torch.Generator().manual_seed(5))
    taps = {s: attention if s.kind == "recv" else t for s, t in inputs.taps.items()}
    transform = Turbo(alpha=1000.0, n_layers=1).reduce(dataclasses.replace(inputs, taps=taps), 40)
    gone = set(range(48)) - set(transform.anchor.tolist())
    assert gone == {2 * i for i in torch.topk(attention[::2], 8, largest=False).indices.tolist()}


@pytest.mark.parametrize("k", [1, 2, 11, 40])
def test_sizes_sum_to_all_tokens(pictures, k: int) -> None:
    inputs = pictures.make(Turbo(), Grid(6, 7), "cls", seed=k)
    transform = Turbo().reduce(inputs, k)
    assert int(transform.size.sum()) == 42 and sorted(transform.indices.tolist()) == list(range(42))
    assert transform.weights is not None
    torch.testing.assert_close(transform.weights, 1.0 / transform.size[transform.owner])


def test_settings_out_of_range_are_refused() -> None:
    cases: list[dict[str, Value]] = [{"alpha": -1.0}, {"beta": 0.0}, {"gamma": -1}, {"n_layers": 65}]
    for params in cases:
        with pytest.raises(ConfigError, match=f"reduce.turbo.{next(iter(params))}"):
            build_reducer("turbo", params)
