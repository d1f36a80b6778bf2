"""VTC-CLS against its sum over layers, written out plainly."""

import dataclasses

import pytest
import torch

from foveate.engine.common import Grid
from foveate.engine.reduce.methods.vtc_cls import VtcCls

LAYERS = {  # the layers that count from each start: all layers that run, or those with full attention
    ("cls", 0.0): range(23),
    ("cls", 0.5): range(11, 23),
    ("merging", 0.0): (7, 15, 23, 31),
    ("merging", 0.5): (15, 23, 31),
}


def plain(layers: list[list[float]], k: int, combine: str) -> list[int]:
    of_token = [{"sum": sum, "min": min, "max": max}[combine](values) for values in zip(*layers, strict=True)]
    return sorted(sorted(range(len(of_token)), key=lambda i: (-of_token[i], i))[:k])


@pytest.mark.parametrize("combine", ["sum", "min", "max"])
@pytest.mark.parametrize(("encoder", "start"), LAYERS)
@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_sum_over_layers(pictures, seed: int, encoder: str, start: float, combine: str) -> None:
    inputs, k = pictures.draw("vtc_cls", seed, encoder, start=start)
    layers = [inputs.saliency(layer).tolist() for layer in LAYERS[encoder, start]]
    assert len(inputs.taps) == len(layers), "nothing else is asked for"
    assert pictures.kept("vtc_cls", inputs, k, start=start, combine=combine) == plain(layers, k, combine)


@pytest.mark.parametrize("encoder", ["cls", "no_cls", "merging", "shallow"])
def test_from_the_last_layer_on_it_is_fastervlm(pictures, encoder: str) -> None:
    inputs = pictures.make(VtcCls(), Grid(7, 5), encoder, seed=2)
    for k in (1, 12, 34):
        assert pictures.kept("vtc_cls", inputs, k, start=1.0) == pictures.kept("fastervlm", inputs, k)


def test_layers_are_equal_and_more_attention_never_drops_a_token(pictures) -> None:
    inputs = pictures.make(VtcCls(), Grid(6, 6), "cls", seed=3)
    kept = pictures.kept("vtc_cls", inputs, 9)
    mirrored = dict(zip(inputs.taps, reversed(inputs.taps.values()), strict=True))
    assert pictures.kept("vtc_cls", dataclasses.replace(inputs, taps=mirrored), 9) == kept
    for token in kept:
        for signal, values in list(inputs.taps.items())[::7]:
            more = {**inputs.taps, signal: values.clone().index_fill_(0, torch.tensor([token]), 1.0)}
            assert token in pictures.kept("vtc_cls", dataclasses.replace(inputs, taps=more), 9)
