"""Linear kernels at every level of the machine, against the plain definition over the unpacked weights."""

import random
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from foveate.kernels.cpu import levels
from foveate.kernels.cpu.weights import FORMS, INTEGERS, Form, PackedWeight
from foveate.kernels.linear import Activation, linear, reference
from foveate.kernels.pack import pack

LEVELS = levels.LEVELS[1 : levels.LEVELS.index(levels.machine()) + 1]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
Products = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with levels.force(request.param):
        yield request.param


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _problem(
    seed: int, form: Form, m: int, n: int, k: int, activation: Activation
) -> tuple[Tensor, PackedWeight, Tensor | None, Tensor | None]:
    """x with strided rows beside NaNs, a weight, and perhaps a bias and a residual."""
    generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    gated = activation == "silu_gate"
    rows = 2 * n if gated else n
    wide = torch.full((m, k + 11), torch.nan)
    wide[:, 5 : 5 + k] = torch.randn(m, k, generator=generator)
    weight = pack(torch.randn(rows, k, generator=generator) / k**0.5, form, gated=gated)
    bias = torch.randn(rows, generator=generator) if chance.random() < 0.5 else None
    residual = torch.randn(m, n + 3, generator=generator)[:, :n] if chance.random() < 0.5 else None
    return wide[:, 5 : 5 + k], weight, bias, residual


def _poison() -> None:
    """Kept NaNs in the memory that the next results get."""
    for size in (100, 1_000, 10_000, 100_000):
        torch.full((size,), torch.nan)


@pytest.fixture
def products(quantized: Any) -> Products:
    """What the kernel gives for a random problem, and what the definition does."""

    def made(seed: int, form: Form, m: int, n: int, k: int, activation: Activation) -> tuple[Tensor, Tensor]:
        x, weight, bias, residual = _problem(seed, form, m, n, k, activation)
        want = reference(quantized(x, form), weight, bias, activation=activation, residual=residual)
        _poison()
        return linear(x, weight, bias, activation=activation, residual=residual), want

    return made


def _room(form: Form) -> dict[str, float]:
    """Of float32 sums. That which an int16 step is made of has another order here, so that a value between two steps
    may fall to the other."""
    return {"rtol": 2e-5, "atol": 2e-4 if form == "int16" else 3e-5}


@pytest.mark.usefixtures("level", "threads")
@pytest.mark.parametrize("form", FORMS)
def test_random_shapes_agree_with_the_definition(products: Products, form: Form) -> None:
    chance = random.Random(f"{form}")
    for seed in range(40):
        m, n = chance.randint(1, 40), chance.choice([1, 5, 16, 31, 48, 130, 400])
        k = chance.choice([1, 3, 64, 65, 127, 129, 512, 1023, 1088, 2050])
        got, want = products(seed, form, m, n, k, chance.choice(ACTIVATIONS))
        assert got.shape == (m, n)
        torch.testing.assert_close(got, want, **_room(form))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("m", [1, 97, 213])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_agree_with_the_definition(products: Products, activation: Activation, form: Form, m: int) -> None:
    got, want = products(m, form, m, 70, 193, activation)
    assert got.shape == (m, 70)
    torch.testing.assert_close(got, want, **_room(form))


@pytest.mark.usefixtures("level", "threads")
@pytest.mark.parametrize("form", FORMS)
def test_rows_beyond_one_share_of_the_cache(products: Products, form: Form) -> None:
    got, want = products(1, form, 1030, 24, 4200, "none")
    assert got.shape == (1030, 24)
    torch.testing.assert_close(got, want, **_room(form))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(("form", "round_inputs"), [*((form, False) for form in FORMS), ("bfloat16", True)])
def test_a_row_does_not_depend_on_the_others(form: Form, round_inputs: bool) -> None:
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(131, 1300, generator=generator)
    weight = pack(torch.randn(200, 1300, generator=generator), form, round_inputs=round_inputs)
    whole = linear(x, weight, activation="silu")
    for first, last in [(0, 1), (3, 5), (10, 17), (40, 52), (90, 131), (17, 34)]:
        assert torch.equal(linear(x[first:last], weight, activation="silu"), whole[first:last]), (first, last)


@pytest.mark.usefixtures("level")
def test_rounded_inputs_cost_no_more_than_their_rounding() -> None:
    generator = torch.Generator().manual_seed(4)
    for m, k in [(1, 64), (9, 96), (40, 1090), (33, 2048)]:
        x, matrix = torch.randn(m, k, generator=generator), torch.randn(50, k, generator=generator) / k**0.5
        weight = pack(matrix, "bfloat16", round_inputs=True)
        got = linear(x, weight)
        bound = x.abs() @ matrix.abs().T * 2**-8  # a rounded input is within 2^-9 of itself
        assert ((got - reference(x, weight)).abs() <= bound + 1e-5).all()
        exact = x.bfloat16().float()
        torch.testing.assert_close(linear(exact, weight), reference(exact, weight), rtol=2e-5, atol=3e-5)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("form", INTEGERS)
def test_quantized_inputs_move_a_product_within_their_bound(quantized: Any, form: Form) -> None:
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(17, 500, generator=generator) * torch.randn(17, 1, generator=generator).exp()
    weight = pack(torch.randn(60, 500, generator=generator), form)
    exact = reference(x, weight)
    half_step = quantized.step(quantized.grouped(x, form), form).amax(1) / 2
    bound = half_step * reference(torch.ones(1, 500), pack(reference(torch.eye(500), weight).T.abs(), "float32"))
    assert ((linear(x, weight) - exact).abs() <= bound * 1.001 + 1e-5).all()


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_of_int16_fit_in_their_integers(sign: int) -> None:
    """Every weight of a group is the largest there is, and every input adds to the same side."""
    generator = torch.Generator().manual_seed(6)
    for m, n_large in [(1, 128), (7, 128), (40, 128), (5, 9), (5, 8), (5, 1)]:
        x = torch.zeros(m, 256)
        x[:, :n_large] = sign * (1 + torch.rand(m, 1, generator=generator))
        x[:, 128 : 128 + n_large] = x[:, :n_large]
        got = linear(x, pack(torch.full((20, 256), 3.0), "int16"))
        torch.testing.assert_close(got, (3 * x.sum(1, keepdim=True)).expand(m, 20), rtol=3e-4, atol=0)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0])
def test_int16_errs_less_than_inputs_rounded_to_bfloat16(spread: float) -> None:
    """On values alike, and on ones some of which are many times the others, as in language models."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(40, 1024, generator=generator) * (spread * torch.randn(1024, generator=generator)).exp()
    matrix = (torch.randn(64, 1024, generator=generator) / 32).bfloat16()
    exact = x.double() @ matrix.double().T
    rounded = x.bfloat16().double() @ matrix.double().T
    error = (linear(x, pack(matrix, "int16")) - exact).norm()
    assert error < (rounded - exact).norm() * (0.25 if spread < 2 else 0.5)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("form", FORMS)
def test_what_is_no_number_stays_in_its_row(form: Form) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(20, 300, generator=generator)
    weight = pack(torch.randn(40, 300, generator=generator), form)
    clean = linear(x, weight)
    x[7, 123], x[11, 5] = torch.nan, torch.inf
    got = linear(x, weight)
    assert not got[[7, 11]].isfinite().any()
    others = [row for row in range(20) if row not in (7, 11)]
    assert torch.equal(got[others], clean[others])


@pytest.mark.usefixtures("level")
def test_no_rows_give_no_rows() -> None:
    assert linear(torch.empty(0, 8), pack(torch.ones(3, 8), "float32")).shape == (0, 3)


def test_a_gate_and_its_activation_go_together() -> None:
    with pytest.raises(AssertionError, match="gated"):
        linear(torch.ones(1, 8), pack(torch.ones(4, 8), "float32"), activation="silu_gate")
    with pytest.raises(AssertionError, match="gated"):
        linear(torch.ones(1, 8), pack(torch.ones(4, 8), "float32", gated=True))
