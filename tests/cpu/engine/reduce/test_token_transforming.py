"""Token Transforming against its sums, written out plainly."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from foveate.engine.common import Grid
from foveate.engine.methods import build_reducer
from foveate.engine.reduce.methods.token_transforming import TokenTransforming


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def plain(worth: list[float], keys: list[list[float]], k: int, temperature: float) -> tuple[list[int], Tensor]:
    n = len(worth)
    chosen = sorted(sorted(range(n), key=lambda i: (-worth[i], i))[:k])
    columns = []
    for j in range(n):
        given = [math.exp(cosine(keys[i], keys[j]) / temperature) for i in chosen]
        columns.append([worth[j] * g / sum(given) for g in given])
    matrix = torch.tensor(columns).T
    return chosen, matrix / matrix.sum(1, keepdim=True)


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_formula(pictures, seed: int) -> None:
    inputs, k = pictures.draw("token_transforming", seed, ("cls", "merging")[seed % 2])
    for temperature in (0.1, 1.0):
        transform = build_reducer("token_transforming", {"temperature": temperature}).reduce(inputs, k)
        chosen, matrix = plain(inputs.saliency().tolist(), inputs.keys().tolist(), k, temperature)
        assert transform.anchor.tolist() == chosen
        torch.testing.assert_close(transform.to_matrix(), matrix, rtol=1e-3, atol=1e-5)


def test_every_token_is_shared_among_several_rows_and_rows_sum_to_1(pictures) -> None:
    inputs = pictures.make(TokenTransforming(), Grid(6, 7), "cls", seed=1)
    transform = TokenTransforming().reduce(inputs, 10)
    assert transform.space == "enc" and transform.matrix is not None
    torch.testing.assert_close(transform.matrix.sum(1), torch.ones(10))
    assert (transform.matrix > 0).all()
    assert TokenTransforming().reduce(inputs, 42).is_identity


@pytest.mark.parametrize("seed", range(5))
def test_a_small_temperature_merges_into_the_nearest(pictures, seed: int) -> None:
    inputs = pictures.make(TokenTransforming(), Grid(5, 5), "cls", seed=seed)
    transform = TokenTransforming(temperature=0.001).reduce(inputs, 6)
    keys = torch.nn.functional.normalize(inputs.keys(), dim=-1)
    cosine = keys @ keys[transform.anchor].T
    best = cosine.topk(2).values
    clear = best[:, 0] - best[:, 1] > 0.02  # e^-20 for the next
    assert torch.equal(transform.back, cosine.argmax(1)) and int(clear.sum()) > 15
    matrix = transform.to_matrix()[:, clear]
    assert torch.equal(matrix.argmax(0), cosine.argmax(1)[clear])
    assert ((matrix > 1e-5 * matrix.amax(0)).sum(0) == 1).all()


def test_no_row_is_made_of_nothing_where_attention_is_0(pictures) -> None:
    inputs = pictures.make(TokenTransforming(), Grid(4, 4), "cls", seed=2)
    for kept in (0, 2):
        taps = {s: t * (torch.arange(16) < kept) if s.kind == "cls_row" else t for s, t in inputs.taps.items()}
        silent = dataclasses.replace(inputs, taps=taps)
        for temperature in (0.001, 0.1):
            matrix = TokenTransforming(temperature=temperature).reduce(silent, 9).to_matrix()
            torch.testing.assert_close(matrix.sum(1), torch.ones(9))
