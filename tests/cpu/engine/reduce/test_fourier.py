"""Fourier against DCTs written as sums, and the properties of the method."""

import math

import pytest
import torch
from torch import Tensor

from foveate.engine.common import Grid
from foveate.engine.methods import build_reducer
from foveate.engine.primitives.ranking import lattice
from foveate.engine.reduce.methods.fourier import Fourier
from foveate.engine.vision import TokenTransform


def plain_dct(x: list[float]) -> list[float]:
    n = len(x)
    scale = [math.sqrt((1 if k == 0 else 2) / n) for k in range(n)]
    return [
        scale[k] * sum(v * math.cos(math.pi * k * (2 * i + 1) / (2 * n)) for i, v in enumerate(x)) for k in range(n)
    ]


def plain_inverse(f: list[float]) -> list[float]:
    n = len(f)
    scale = [math.sqrt((1 if k == 0 else 2) / n) for k in range(n)]
    return [sum(scale[k] * f[k] * math.cos(math.pi * k * (2 * i + 1) / (2 * n)) for k in range(n)) for i in range(n)]


def plain(image: list[list[float]], h: int, w: int) -> list[list[float]]:
    """From [H][W] of one channel to [h][w], not rescaled."""
    by_row = [plain_dct(row)[:w] for row in image]
    both = [plain_dct([row[x] for row in by_row])[:h] for x in range(w)]
    columns = [plain_inverse(column) for column in both]
    return [plain_inverse([columns[x][y] for x in range(w)]) for y in range(h)]


def rows_of(transform: TokenTransform, inputs) -> Tensor:
    return transform.apply_to(inputs.proj, inputs.enc, inputs.project)


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_cut_spectrum(pictures, seed: int, compat: bool) -> None:
    inputs, k = pictures.draw("fourier", seed, "merging")
    grid, shape = inputs.grid, lattice(inputs.grid, k)
    transform = build_reducer("fourier", {"compat": compat}).reduce(inputs, k)
    scale = 1.0 if compat else math.sqrt(shape.n_tokens / grid.n_tokens)
    channel = inputs.proj[:, 5].view(grid.rows, grid.cols).tolist()
    expected = torch.tensor(plain(channel, shape.rows, shape.cols)).flatten() * scale
    torch.testing.assert_close(rows_of(transform, inputs)[:, 5], expected, rtol=1e-4, atol=1e-4)


def test_constants_energy_and_whole_spectrum(pictures) -> None:
    inputs = pictures.make(Fourier(), Grid(12, 8), "merging", seed=3)
    released = Fourier(compat=True).reduce(inputs, 24)
    assert released.matrix is not None
    torch.testing.assert_close(released.matrix.sum(1), torch.full((24,), 2.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(released.matrix @ released.matrix.T, torch.eye(24), rtol=1e-4, atol=1e-4)
    recovered = released.matrix.T @ rows_of(released, inputs)  # band-limited: nothing is lost
    again = released.matrix @ recovered
    torch.testing.assert_close(again, rows_of(released, inputs), rtol=1e-4, atol=1e-4)
    assert Fourier().reduce(inputs, 96).is_identity


def test_it_mixes_before_the_projector_where_it_can(pictures) -> None:
    inputs = pictures.make(Fourier(), Grid(6, 6), "cls", seed=4)
    transform = Fourier().reduce(inputs, 9)
    assert transform.space == "enc" and transform.matrix is not None
    assert inputs.enc is not None and inputs.project is not None
    torch.testing.assert_close(rows_of(transform, inputs), inputs.project(transform.matrix @ inputs.enc))
