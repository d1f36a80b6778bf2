"""Packing of weights: what comes back, how far quantization may move it, and what a user may ask for."""

import pytest
import torch
from torch import Tensor

from foveate.kernels.cpu import levels
from foveate.kernels.cpu.weights import FORMS, GROUP, Form, rows, unpack
from foveate.kernels.pack import pack

SHAPES = [(1, 1), (15, 7), (16, 64), (17, 129), (33, 200), (130, 513), (1040, 70)]


def _matrix(n: int, k: int, seed: int = 0) -> Tensor:
    """Values over several orders of magnitude, with zeros."""
    generator = torch.Generator().manual_seed(seed + 1000 * n + k)
    matrix = torch.randn(n, k, generator=generator) * torch.randn(n, 1, generator=generator).exp()
    return matrix * (torch.rand(n, k, generator=generator) > 0.1)


def _steps(matrix: Tensor, form: Form) -> Tensor:
    """A quantization step at each value, by the definition: the largest of its row and group over the most there is."""
    group, top = GROUP[form], {"int16": 8191, "int8": 127, "int4": 8}[form]
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % group)).unflatten(1, (-1, group))
    largest = padded.abs().amax(2, keepdim=True).expand_as(padded)
    return (largest / top).flatten(1)[:, : matrix.shape[1]]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_floats_come_back_to_the_bit(shape: tuple[int, int], dtype: torch.dtype, gated: bool) -> None:
    matrix = _matrix(shape[0] * (2 if gated else 1), shape[1]).to(dtype)
    assert torch.equal(unpack(pack(matrix, "float32", gated=gated)), matrix.float())
    assert torch.equal(unpack(pack(matrix, "bfloat16", gated=gated)), matrix.bfloat16().float())


@pytest.mark.skipif(levels.machine() == "reference", reason="the C++ kernels are not here, or no AVX2")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packing_in_cpp_has_the_bits_of_the_definition(dtype: torch.dtype, form: Form) -> None:
    for n, k in [*SHAPES, (48, 256), (5, 1000)]:
        for gated in (False, True):
            wide = torch.full((n * (2 if gated else 1), k + 3), torch.nan, dtype=dtype)
            matrix = wide[:, :k]
            matrix.copy_(_matrix(*matrix.shape))
            with levels.force("reference"):
                wanted = pack(matrix, form, gated=gated)
            got = pack(matrix, form, gated=gated)
            assert torch.equal(got.data, wanted.data), (n, k, gated)
            if got.scales is not None and wanted.scales is not None:
                assert torch.equal(got.scales, wanted.scales), (n, k, gated)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(32, 16, 5), (17, 30), (24, 24), (16, 16)])
def test_pieces_pack_as_the_whole(sizes: tuple[int, ...], form: Form) -> None:
    matrix = _matrix(sum(sizes), 140)
    for gated in (False, True):
        if gated and sum(sizes) % 2:
            continue
        whole, parts = pack(matrix, form, gated=gated), pack(matrix.split(sizes), form, gated=gated)
        assert (parts.n, parts.k) == matrix.shape and torch.equal(parts.data, whole.data)
        assert torch.equal(unpack(parts), unpack(whole))


@pytest.mark.parametrize("form", ["int16", "int8"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_symmetric_integers_are_within_half_a_step(shape: tuple[int, int], gated: bool, form: Form) -> None:
    matrix = _matrix(shape[0] * (2 if gated else 1), shape[1])
    error = (unpack(pack(matrix, form, gated=gated)) - matrix).abs()
    assert (error <= _steps(matrix, form) * 0.501).all()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_int4_is_within_half_a_step_and_exact_at_the_largest(shape: tuple[int, int], gated: bool) -> None:
    matrix = _matrix(shape[0] * (2 if gated else 1), shape[1])
    packed = unpack(pack(matrix, "int4", gated=gated))
    error, step = (packed - matrix).abs(), _steps(matrix, "int4")
    # The end that the largest value does not take reaches 7 steps of 8: what lies beyond is cut by up to one step.
    assert (error <= step * 1.0001).all()
    assert (error[matrix.abs() <= 7 * step] <= step[matrix.abs() <= 7 * step] * 0.5001).all()
    largest = matrix.abs() == 8 * step
    assert torch.equal(packed[largest], matrix[largest])


@pytest.mark.parametrize("form", FORMS)
def test_what_lies_on_the_grid_is_kept_exactly(form: Form) -> None:
    generator = torch.Generator().manual_seed(3)
    low, high = {"int4": (-8, 8), "int16": (-8191, 8192)}.get(form, (-127, 128))
    grid = torch.randint(low, high, (48, 384), generator=generator)
    grid[:, :: GROUP["int4"]] = low  # every group holds its largest value
    matrix = grid.float() * 0.25
    assert torch.equal(unpack(pack(matrix, form)), matrix)


@pytest.mark.parametrize("form", FORMS)
def test_zeros_stay_zeros(form: Form) -> None:
    assert torch.equal(unpack(pack(torch.zeros(20, 100), form)), torch.zeros(20, 100))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_rows_are_those_of_the_matrix(form: Form, gated: bool) -> None:
    packed = pack(_matrix(74, 201), form, gated=gated)
    ids = torch.randint(0, 74, (50,), generator=torch.Generator().manual_seed(5))
    assert torch.equal(rows(packed, ids), unpack(packed)[ids])
    assert rows(packed, ids[:0]).shape == (0, 201)


@pytest.mark.parametrize("form", FORMS)
def test_strided_input_packs_like_a_packed_one(form: Form) -> None:
    wide = _matrix(40, 300)
    view = wide[:, 3:180]
    assert torch.equal(unpack(pack(view, form)), unpack(pack(view.contiguous(), form)))
    assert torch.equal(unpack(pack(wide.T, form)), unpack(pack(wide.T.contiguous(), form)))


@pytest.mark.parametrize(("form", "bits"), [*zip(FORMS, (32, 16, 8.25, 4.5, 16.25), strict=True)])
def test_bytes_are_those_of_the_form(form: Form, bits: float) -> None:
    packed = pack(_matrix(256, 1024), form)
    assert packed.nbytes == 256 * 1024 * bits / 8
    assert packed.data.data_ptr() % 64 == 0


def test_packing_changes_nothing_in_its_input() -> None:
    matrix = _matrix(33, 130)
    before = matrix.clone()
    for form in FORMS:
        pack(matrix, form)
    assert torch.equal(matrix, before)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="int3.*float32, bfloat16, int8, int4, int16"):
        pack(torch.zeros(4, 4), "int3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two projections.*5 rows"):
        pack(torch.zeros(5, 4), "int8", gated=True)
