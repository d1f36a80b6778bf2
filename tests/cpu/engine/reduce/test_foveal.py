"""Foveal against its steps, written out plainly, and the effect of its power at both ends."""

import dataclasses

import pytest
import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import Grid, signals
from foveate.engine.reduce.methods.foveal import Foveal


def plain(rows: Tensor, attention: list[float], k: int, sharpness: float) -> list[int]:
    n = len(attention)
    worth = [max(a / max(attention), 1e-6) ** (sharpness * k / n) for a in attention]
    cosine = [[float(torch.nn.functional.cosine_similarity(a, b, dim=0)) for b in rows] for a in rows]
    kept = [max(range(n), key=lambda i: (worth[i], -i))]
    while len(kept) < k:
        gain = {i: worth[i] * max(1e-4, min(1 - cosine[i][j] for j in kept)) for i in range(n) if i not in kept}
        kept.append(max(gain, key=lambda i: (gain[i], -i)))
    return sorted(kept)


@pytest.mark.parametrize("encoder", ["cls", "merging"])
@pytest.mark.parametrize("sharpness", [0.0, 6.0, 30.0])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_its_rule_step_by_step(pictures, seed: int, sharpness: float, encoder: str) -> None:
    inputs, k = pictures.draw("foveal", seed, encoder)
    expected = plain(inputs.hidden(), inputs.recv().tolist(), k, sharpness)
    assert pictures.kept("foveal", inputs, k, sharpness=sharpness) == expected


def test_equal_rows_go_by_attention(pictures) -> None:
    inputs = pictures.make(Foveal(), Grid(6, 6), "cls", fill=1.0)
    attention = torch.rand(36, generator=torch.Generator().manual_seed(1))
    inputs = dataclasses.replace(inputs, taps={**inputs.taps, inputs.tower.resolve(signals.recv()): attention})
    best = attention.argsort(descending=True)
    for k in (1, 9, 35):
        assert pictures.kept("foveal", inputs, k) == sorted(best[:k].tolist())


def test_a_copy_of_what_is_kept_waits_for_everything_else(pictures) -> None:
    inputs = pictures.make(Foveal(), Grid(4, 5), "cls", seed=4)
    rows = inputs.hidden().clone()
    rows[10:] = rows[:10]
    inputs = dataclasses.replace(inputs, taps={**inputs.taps, inputs.tower.resolve(signals.hidden()): rows})
    kept = pictures.kept("foveal", inputs, 10)
    assert sorted(i % 10 for i in kept) == list(range(10)), "one of each pair"
    attended = [max(i, (i + 10) % 20, key=lambda j: float(inputs.recv()[j])) for i in range(10)]
    assert kept == sorted(attended), "the one that is looked at"


def test_a_power_that_is_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="sharpness"):
        Foveal(sharpness=-1.0)
