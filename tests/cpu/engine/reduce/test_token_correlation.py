"""Token-level Correlation against its steps, written out plainly."""

import dataclasses
import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from foveate.engine.common import Grid
from foveate.engine.primitives.math import largest_remainder
from foveate.engine.reduce.methods.token_correlation import TokenCorrelation
from foveate.engine.vision import VisualInputs

TILED = Grid(8, 6, thumbnail=4, row_cuts=(0, 4, 8), col_cuts=(0, 3, 6))


def crowded(inputs: VisualInputs, seed: int) -> VisualInputs:
    """With features near a few directions, so that some tokens are redundant and some are not."""
    g = torch.Generator().manual_seed(seed)
    shape = next(rows.shape for signal, rows in inputs.taps.items() if signal.kind == "hidden")
    kinds = torch.randn(4, shape[1], generator=g)[torch.randint(0, 4, shape[:1], generator=g)]
    rows = kinds + torch.randn(shape, generator=g) * torch.rand(shape[0], 1, generator=g)
    taps = {signal: rows if signal.kind == "hidden" else found for signal, found in inputs.taps.items()}
    return dataclasses.replace(inputs, taps=taps)


def plain_redundant(rows: Tensor, similarity: float) -> list[bool]:
    x = torch.nn.functional.normalize(rows.double(), dim=-1)
    cosine, n = (x @ x.T).tolist(), len(x)
    alike = [sum(cosine[i][j] > similarity for j in range(n) if j != i) for i in range(n)]
    return [count >= 0.1 * n for count in alike]


def plain(inputs: VisualInputs, k: int, similarity: float) -> list[int]:
    attention, asked, order = inputs.saliency().tolist(), [], []
    for tile in inputs.grid.tiles:
        cells = tile.cells()
        redundant = dict(zip(cells, plain_redundant(inputs.hidden()[cells], similarity), strict=True))
        density = 1 - sum(redundant.values()) / len(cells)
        asked.append(math.ceil(round(len(cells) * min(max(density, 0.05), 1.0), 9)))
        if tile.kind == "thumbnail":
            asked[-1] = len(cells)
        order.append(sorted(cells, key=lambda i: (redundant[i], -attention[i], i)))
    shares = largest_remainder(asked, k, [len(cells) for cells in order])
    return sorted(i for cells, share in zip(order, shares, strict=True) for i in cells[:share])


@pytest.mark.parametrize("encoder", ["cls", "merging"])
@pytest.mark.parametrize("seed", range(20))
def test_it_follows_the_paper_step_by_step(pictures, seed: int, encoder: str) -> None:
    for similarity in (0.9, 0.5):
        inputs, k = pictures.draw("token_correlation", seed, encoder)
        inputs = crowded(inputs, seed)
        kept = pictures.kept("token_correlation", inputs, k, similarity=similarity, dominance=1000)
        assert kept == plain(inputs, k, similarity)
        tiled = crowded(pictures.make(TokenCorrelation(), TILED, encoder, seed=seed), seed)
        kept = pictures.kept("token_correlation", tiled, 20 + seed, similarity=similarity, dominance=1000)
        assert kept == plain(tiled, 20 + seed, similarity)


def test_a_blank_tile_asks_for_the_floor_and_one_of_strangers_for_all() -> None:
    method = TokenCorrelation()
    blank, strangers = torch.ones(60, 64) / 8, torch.eye(60, 64)
    assert method.redundant(blank).all() and method.asked(method.redundant(blank)) == 3
    assert not method.redundant(strangers).any() and method.asked(method.redundant(strangers)) == 60


def test_tiles_with_more_to_say_keep_more(pictures) -> None:
    inputs = pictures.make(TokenCorrelation(), TILED, "cls", seed=1)
    last, hidden = torch.tensor(TILED.tiles[-1].cells()), inputs.hidden().clone()
    hidden[last] = hidden[last[0]].clone()
    taps = {signal: hidden if signal.kind == "hidden" else rows for signal, rows in inputs.taps.items()}
    kept = set(pictures.kept("token_correlation", dataclasses.replace(inputs, taps=taps), 32))
    counts = [len(kept & set(tile.cells())) for tile in TILED.tiles]
    assert len(kept) == 32 and counts[-1] <= 1 < min(counts[:-1]) and counts[0] == max(counts)


def test_outliers_make_it_a_draw_in_proportion(pictures) -> None:
    inputs = pictures.make(TokenCorrelation(), Grid(6, 6), "cls", seed=2)
    attention = torch.full((36,), 1e-3).index_fill(0, torch.tensor([7]), 0.9)
    attention[18:] *= 3
    taps = {signal: attention if signal.kind == "cls_row" else rows for signal, rows in inputs.taps.items()}
    drawn: Counter[int] = Counter()
    for seed in range(150):
        seeded = dataclasses.replace(inputs, taps=taps, seed=seed)
        kept = pictures.kept("token_correlation", seeded, 5)
        assert kept == pictures.kept("token_correlation", seeded, 5)
        drawn.update(kept)
    low, high = (sum(drawn[i] for i in part if i != 7) for part in (range(18), range(18, 36)))
    assert drawn[7] > 145 and 2 < high / low < 4
    even = {s: torch.full((36,), 1 / 36) if s.kind == "cls_row" else rows for s, rows in inputs.taps.items()}
    assert pictures.kept("token_correlation", dataclasses.replace(inputs, taps=even), 5) == [0, 1, 2, 3, 4]
