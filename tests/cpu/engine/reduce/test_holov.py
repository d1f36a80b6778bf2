"""HoloV against its steps, written out plainly."""

import dataclasses

import pytest
import torch
from torch import Tensor

from foveate.engine.common import Grid
from foveate.engine.reduce.methods.holov import HoloV

EPS = 1e-6


def plain_shares(
    attention: list[float], rows: Tensor, k: int, sizes: list[int], alpha: float, compat: bool
) -> list[int]:
    x = torch.nn.functional.normalize(rows.double(), dim=-1)
    worth, first = [], 0
    for size in sizes:
        crop = range(first, first + size)
        first += size
        spread = []
        for i in crop:
            cosines = [0.0 if j == i else float(x[i] @ x[j]) for j in crop]
            mean = sum(cosines) / max(size - 1, 1)
            apart = [(c - mean) ** 2 for c, j in zip(cosines, crop, strict=True) if compat or j != i]
            spread.append(sum(apart) / max(size - 1, 1))
        focus = [1000 * attention[i] for i in crop]
        scale = (sum(focus) / size) / (sum(spread) / size + EPS)
        worth.append(sum(a + alpha * scale * v for a, v in zip(focus, spread, strict=True)) / size)
    shares = [int(w / (sum(worth) + EPS) * k) for w in worth]
    for p in sorted(range(len(sizes)), key=lambda p: (-worth[p], p))[: k - sum(shares)]:
        shares[p] += 1
    return shares


def plain_pick(attention: list[float], shares: list[int], sizes: list[int]) -> list[int]:
    kept, first = [], 0
    for share, size in zip(shares, sizes, strict=True):
        crop = range(first, first + size)
        kept += sorted(sorted(crop, key=lambda i: (-attention[i], i))[:share])
        first += size
    return kept


def sizes_of(n: int, crops: int) -> list[int]:
    sizes = [n // crops + (1 if p < n % crops else 0) for p in range(crops)]
    return [size for size in sizes if size]


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_paper_step_by_step(pictures, seed: int, compat: bool) -> None:
    for crops, alpha in ((16, 0.09), (4, 3.0), (1, 0.09)):
        inputs, k = pictures.draw("holov", seed)
        attention, sizes = inputs.saliency().tolist(), sizes_of(inputs.n, crops)
        shares = plain_shares(attention, inputs.proj, k, sizes, alpha, compat)
        kept = pictures.kept("holov", inputs, k, crops=crops, alpha=alpha, compat=compat)
        expected = plain_pick(attention, shares, sizes)
        over = [p for p, size in enumerate(sizes) if shares[p] > size]
        if not over:
            assert kept == expected
        else:  # the released code loses the overflow; ours gives the overflow to crops with room
            assert set(expected) < set(kept) and len(kept) == k


def test_one_crop_is_attention_alone(pictures) -> None:
    for seed in range(5):
        inputs, k = pictures.draw("holov", seed)
        assert pictures.kept("holov", inputs, k, crops=1) == pictures.kept("fastervlm", inputs, k)


def test_alpha_0_shares_by_the_mass_of_attention(pictures) -> None:
    inputs = pictures.make(HoloV(), Grid(16, 16), "cls", seed=4)
    kept = torch.tensor(pictures.kept("holov", inputs, 64, alpha=0.0))
    mass = inputs.saliency().view(16, 16).sum(1)
    counts = torch.bincount(kept // 16, minlength=16)
    assert ((counts - 64 * mass / mass.sum()).abs() < 1).all()


def test_variance_counts_where_it_is_balanced_over_the_picture(pictures) -> None:
    inputs = pictures.make(HoloV(), Grid(16, 16), "cls", seed=5)
    rows = inputs.proj.clone()
    rows[16:] = rows[16]  # only the first crop is varied
    inputs = dataclasses.replace(inputs, proj=rows)
    even = [sum(i < 16 for i in pictures.kept("holov", inputs, 64, alpha=a)) for a in (0.0, 1.0)]
    more = [sum(i < 16 for i in pictures.kept("holov", inputs, 64, alpha=a, balance="picture")) for a in (0.0, 1.0)]
    assert more[0] == even[0] and more[1] > max(even)


def test_overflow_goes_to_other_crops(pictures) -> None:
    inputs = pictures.make(HoloV(), Grid(8, 8), "cls", seed=6)
    peak = torch.full((64,), 1e-4).index_fill(0, torch.tensor([5]), 1.0)
    inputs = dataclasses.replace(inputs, taps=dict.fromkeys(inputs.taps, peak))
    kept = pictures.kept("holov", inputs, 20, crops=16)
    assert len(kept) == 20 and {4, 5, 6, 7} <= set(kept)
