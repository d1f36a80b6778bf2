"""DyMU's dynamic merging against its passes, written out plainly, and its properties."""

import dataclasses

import pytest
import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import Grid
from foveate.engine.methods import build_reducer
from foveate.engine.reduce.methods.dymu import DyMU
from foveate.engine.vision import VisualInputs


def plain(layers: list[Tensor], k: int, threshold: float) -> dict[int, list[int]]:
    """The tokens of each row, by anchor."""
    clusters = {i: [i] for i in range(len(layers[0]))}
    step = 0
    while len(clusters) > k:
        anchors, n = sorted(clusters), len(clusters)
        keys = torch.stack([layers[min(step, len(layers) - 1)][clusters[a]].double().mean(0) for a in anchors])
        keys = torch.nn.functional.normalize(keys, dim=-1)
        cosine = (keys @ keys.T).tolist()
        close = {}
        for a in range(0, n, 2):
            cosines = [(cosine[a][b], -b) for b in range(1, n, 2)]
            close[a] = max(cosines)
        r = min(n // 2, n - k)
        if step < len(layers):
            r = min(r, sum(score > threshold for score, _ in close.values()))
        for a in sorted(close, key=lambda a: (-close[a][0], a))[:r]:
            clusters[anchors[-close[a][1]]] += clusters.pop(anchors[a])
        step += 1
    return {anchor: sorted(clusters[anchor]) for anchor in sorted(clusters)}


def clusters_of(name: str, inputs: VisualInputs, k: int, **params: bool | int | float | str) -> dict[int, list[int]]:
    transform = build_reducer(name, params).reduce(inputs, k)
    assert transform.is_identity or transform.weights is not None
    ends = zip(transform.indptr.tolist(), transform.indptr.tolist()[1:], strict=False)
    members = [transform.indices[start:end].tolist() for start, end in ends]
    return dict(zip(transform.anchor.tolist(), members, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_paper_step_by_step(pictures, seed: int) -> None:
    for threshold, n_layers in ((0.9, 4), (0.6, 3), (-1.0, 2)):
        params = {"threshold": threshold, "n_layers": n_layers}
        inputs, k = pictures.draw("dymu", seed, ("cls", "merging")[seed % 2], **params)
        layers = [inputs.keys((i + 1) / n_layers) for i in range(n_layers)]
        assert clusters_of("dymu", inputs, k, **params) == plain(layers, k, threshold)


@pytest.mark.parametrize("k", [1, 3, 20, 41])
def test_sizes_sum_to_all_tokens_and_rows_are_plain_means(pictures, k: int) -> None:
    inputs = pictures.make(DyMU(), Grid(6, 7), "cls", seed=k)
    transform = DyMU().reduce(inputs, k)
    assert int(transform.size.sum()) == 42 and sorted(transform.indices.tolist()) == list(range(42))
    assert transform.space == "enc" and transform.weights is not None
    torch.testing.assert_close(transform.weights, 1.0 / transform.size[transform.owner])
    assert (transform.back >= 0).all()


def test_a_threshold_of_1_merges_by_the_last_layer_alone(pictures) -> None:
    inputs = pictures.make(DyMU(), Grid(5, 6), "cls", seed=1)
    other = pictures.make(DyMU(), Grid(5, 6), "cls", seed=2)
    last = inputs.tower.layer(1.0)
    taps = {s: t if s.layer == last else other.taps[s] for s, t in inputs.taps.items()}
    changed = dataclasses.replace(inputs, taps=taps)
    for k in (4, 12, 29):
        assert clusters_of("dymu", inputs, k, threshold=1.0) == clusters_of("dymu", changed, k, threshold=1.0)
    assert clusters_of("dymu", inputs, 12, threshold=0.5) != clusters_of("dymu", changed, 12, threshold=0.5)


def test_duplicates_merge_before_anything_else(pictures) -> None:
    inputs = pictures.make(DyMU(), Grid(4, 8), "no_cls", seed=3)
    taps = {s: t[torch.arange(32) // 2 * 2] for s, t in inputs.taps.items()}  # pairs: 0 1, 2 3, ...
    found = clusters_of("dymu", dataclasses.replace(inputs, taps=taps), 16)
    assert found == {i + 1: [i, i + 1] for i in range(0, 32, 2)}


def test_settings_out_of_range_are_refused() -> None:
    for params in ({"threshold": 1.5}, {"n_layers": 0}):
        with pytest.raises(ConfigError, match=f"reduce.dymu.{next(iter(params))}"):
            build_reducer("dymu", params)
