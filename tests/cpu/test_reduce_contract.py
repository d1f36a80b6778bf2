"""Every file of engine/reduce keeps the family's laws, found by being there."""

import dataclasses

import pytest
import torch
from torch import Tensor

import foveate.engine.reduce as family
from foveate.engine.errors import ImageError
from foveate.engine.find import find, names
from foveate.engine.grid import Grid
from foveate.engine.reduce.base import Reducer, TokenTransform, VisualInputs

torch.set_num_threads(1)
GRIDS = [Grid(1, 1), Grid(1, 7), Grid(5, 1), Grid(4, 4), Grid(3, 11), Grid(9, 6)]
ENCODERS = ["cls", "no_cls", "merging"]
every_method = pytest.mark.parametrize("name", names(family))
every_encoder = pytest.mark.parametrize("encoder", ENCODERS)


def picture(reducer: Reducer, grid: Grid, encoder: str, fill: float | None = None, seed: int = 0) -> VisualInputs:
    """Random (or constant) features, with exactly the signals the method asks for."""
    g = torch.Generator().manual_seed(seed)

    def rows(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g) if fill is None else torch.full(shape, fill)

    n, wanted = grid.n_tokens, reducer.signals(encoder == "cls")
    proj, enc, keys, attention = rows(n, 8), rows(n, 6), rows(n, 5), rows(n).softmax(0)
    matrix = torch.linspace(-1, 1, 48).view(6, 8)
    with_enc = "enc" in wanted and encoder != "merging"
    return VisualInputs(
        grid=grid,
        proj=enc @ matrix if with_enc else proj,
        enc=enc if with_enc else None,
        project=(lambda x: x @ matrix) if with_enc else None,
        cls_attention=attention if "cls_attention" in wanted else None,
        received=attention if "received" in wanted else None,
        keys=keys if "keys" in wanted else None,
        seed=seed,
    )


def check_laws(transform: TokenTransform, inputs: VisualInputs, n_out: int) -> Tensor:
    n, (indptr, indices, anchor) = inputs.grid.n_tokens, (transform.indptr, transform.indices, transform.anchor)
    assert transform.n_in == n
    assert transform.n_out == n_out
    assert all(t.dtype == torch.int64 for t in (indptr, indices, anchor, transform.size))
    assert indptr.shape == (n_out + 1,) and indptr[0] == 0 and indptr[-1] == len(indices)
    assert (indptr.diff() >= 1).all()
    assert (indices >= 0).all() and (indices < n).all()
    assert (anchor.diff() > 0).all() and anchor[0] >= 0 and anchor[-1] < n
    for row in range(n_out):
        terms = indices[indptr[row] : indptr[row + 1]]
        assert (terms.diff() > 0).all() and anchor[row] in terms
        assert transform.size[row] == len(terms)
    if transform.weights is None:
        assert torch.equal(indices, anchor)
    else:
        assert transform.weights.dtype == torch.float32 and torch.isfinite(transform.weights).all()
        sums = torch.zeros(n_out).index_add_(0, torch.arange(n_out).repeat_interleave(indptr.diff()), transform.weights)
        torch.testing.assert_close(sums, torch.ones(n_out))
    out = transform.apply(inputs)
    assert out.shape == (n_out, inputs.proj.shape[1]) and out.dtype == inputs.proj.dtype
    assert torch.isfinite(out).all()
    return out


@every_method
@every_encoder
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_laws_hold_for_every_budget(name: str, encoder: str, grid: Grid) -> None:
    reducer = find(family, name)()
    inputs = picture(reducer, grid, encoder)
    previous = 0
    for budget in range(1, grid.n_tokens + 3):
        n_out = reducer.count(grid, budget)
        assert 1 <= n_out <= (grid.n_tokens if name == "none" else min(budget, grid.n_tokens))
        assert n_out >= previous, "a larger budget never keeps fewer"
        previous = n_out
        check_laws(reducer.reduce(inputs, budget), inputs, n_out)
    assert reducer.count(grid, grid.n_tokens) == grid.n_tokens


@every_method
@every_encoder
def test_keeping_all_is_the_identity_bit_for_bit(name: str, encoder: str) -> None:
    reducer = find(family, name)()
    inputs = picture(reducer, Grid(4, 5), encoder)
    for budget in (20, 21, 10_000):
        transform = reducer.reduce(inputs, budget)
        assert transform.is_identity
        assert transform.apply(inputs) is inputs.proj


@every_method
@every_encoder
@pytest.mark.parametrize("fill", [0.0, 1.0, -3.5])
def test_blank_picture(name: str, encoder: str, fill: float) -> None:
    reducer = find(family, name)()
    inputs = picture(reducer, Grid(6, 7), encoder, fill)
    for budget in (1, 2, 20, 41):
        out = check_laws(reducer.reduce(inputs, budget), inputs, reducer.count(inputs.grid, budget))
        torch.testing.assert_close(out, inputs.proj[: len(out)])


@every_method
@every_encoder
def test_same_inputs_same_bits(name: str, encoder: str) -> None:
    cls = find(family, name)
    inputs = picture(cls(), Grid(7, 8), encoder, seed=3)
    first, second = cls().reduce(inputs, 19), cls().reduce(dataclasses.replace(inputs), 19)
    for field in ("indptr", "indices", "anchor", "size"):
        assert torch.equal(getattr(first, field), getattr(second, field))
    assert torch.equal(first.apply(inputs), second.apply(inputs))


@every_method
@every_encoder
def test_choice_does_not_depend_on_the_dtype_of_equal_rows(name: str, encoder: str) -> None:
    reducer = find(family, name)()
    inputs = picture(reducer, Grid(6, 6), encoder, seed=5)
    enc = None if inputs.enc is None else inputs.enc.bfloat16()
    low = dataclasses.replace(inputs, proj=inputs.proj.bfloat16(), enc=enc, project=inputs.project and _project_low)
    high = dataclasses.replace(low, proj=low.proj.float(), enc=None if enc is None else enc.float())
    one, other = reducer.reduce(low, 9), reducer.reduce(high, 9)
    assert torch.equal(one.anchor, other.anchor) and torch.equal(one.indices, other.indices)
    assert one.apply(low).dtype == torch.bfloat16


def _project_low(rows: Tensor) -> Tensor:
    return rows @ torch.ones(6, 8, dtype=rows.dtype)


@every_method
@pytest.mark.parametrize("encoder", ["cls", "merging"])
def test_large_picture(name: str, encoder: str) -> None:
    reducer = find(family, name)()
    inputs = picture(reducer, Grid(64, 64), encoder)
    transform = reducer.reduce(inputs, 300)
    assert transform.n_out == reducer.count(inputs.grid, 300)
    assert (transform.anchor.diff() > 0).all()
    assert transform.apply(inputs).shape == (transform.n_out, 8)


@every_method
@every_encoder
def test_asks_only_for_what_the_encoder_has(name: str, encoder: str) -> None:
    wanted = find(family, name)().signals(encoder == "cls")
    assert wanted <= {"cls_attention", "received", "keys", "enc"}
    assert encoder == "cls" or "cls_attention" not in wanted


@every_method
@every_encoder
def test_features_that_are_not_finite_are_refused_or_not_looked_at(name: str, encoder: str) -> None:
    reducer = find(family, name)()
    inputs = picture(reducer, Grid(4, 4), encoder)
    poison = {
        field: getattr(inputs, field).index_fill(0, torch.tensor([3]), torch.nan)
        for field in ("proj", "cls_attention", "received", "keys")
        if getattr(inputs, field) is not None
    }
    poisoned = dataclasses.replace(inputs, **poison)
    try:
        transform = reducer.reduce(poisoned, 5)
    except ImageError as error:
        assert "not finite" in str(error)
    else:
        assert torch.equal(transform.anchor, reducer.reduce(inputs, 5).anchor)


def test_a_method_without_any_rule_is_our_own_bug() -> None:
    reducer = Reducer()
    with pytest.raises(AssertionError, match="neither select nor transform"):
        reducer.reduce(VisualInputs(grid=Grid(2, 2), proj=torch.zeros(4, 3)), 2)
