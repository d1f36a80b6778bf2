"""The contract of the reducers: every file of engine/reduce/methods is found and tested."""

import dataclasses

import pytest
import torch
from torch import Tensor

import foveate.engine.reduce.methods as family
from foveate.engine.common import PIXELS, Grid, ImageError, load_method, names, saliency
from foveate.engine.methods import build_split, splits
from foveate.engine.reduce.base import Reducer
from foveate.engine.vision import TokenTransform, VisualInputs

torch.set_num_threads(1)
GRIDS = [Grid(1, 1), Grid(1, 7), Grid(5, 1), Grid(4, 4), Grid(3, 11), Grid(9, 6)]
ENCODERS = ["cls", "no_cls", "merging", "shallow"]
every_method = pytest.mark.parametrize("name", names(family))
every_encoder = pytest.mark.parametrize("encoder", ENCODERS)


def begin(pictures, name: str, encoder: str, grid: Grid, **more: float | None) -> tuple[Reducer, VisualInputs]:
    reducer = load_method(family, name)()
    if not pictures.fits(reducer, encoder):
        pytest.skip("not for this encoder")
    return reducer, pictures.make(reducer, grid, encoder, **more)


def apply(transform: TokenTransform, inputs: VisualInputs) -> Tensor:
    return transform.apply_to(inputs.proj, inputs.enc, inputs.project)


def as_dtype(inputs: VisualInputs, dtype: torch.dtype) -> VisualInputs:
    fields = ("proj", "enc", "cells", "question", "caption")
    return dataclasses.replace(inputs, **{f: v.to(dtype) for f in fields if (v := getattr(inputs, f)) is not None})


def check_laws(transform: TokenTransform, inputs: VisualInputs, n_out: int) -> Tensor:
    n, (indptr, indices, anchor) = inputs.n, (transform.indptr, transform.indices, transform.anchor)
    assert transform.n_in == n
    assert transform.n_out == n_out
    assert all(t.dtype == torch.int64 for t in (indptr, indices, anchor, transform.size))
    assert all(t.device.type == "cpu" for t in (indptr, indices, anchor, transform.size))
    assert (anchor.diff() > 0).all() and anchor[0] >= 0 and anchor[-1] < n
    back = transform.back
    assert back.shape == (n,) and (back >= -1).all() and (back < n_out).all()
    assert torch.equal(back[anchor], torch.arange(n_out)), "a row stands for the token whose place it takes"
    if transform.matrix is not None:
        check_dense(transform, n_out, n)
    else:
        check_sparse(transform, n_out, n)
    out = apply(transform, inputs)
    assert out.shape == (n_out, inputs.proj.shape[1]) and out.dtype == inputs.proj.dtype
    assert torch.isfinite(out).all()
    return out


def check_dense(transform: TokenTransform, n_out: int, n: int) -> None:
    assert transform.matrix is not None
    assert transform.matrix.shape == (n_out, n) and transform.matrix.dtype == torch.float32
    torch.testing.assert_close(transform.matrix.sum(1), torch.ones(n_out), rtol=1e-4, atol=1e-4)
    assert torch.equal(transform.size, torch.bincount(transform.back[transform.back >= 0], minlength=n_out))
    assert not transform.indptr.any() and not len(transform.indices)


def check_sparse(transform: TokenTransform, n_out: int, n: int) -> None:
    indptr, indices, anchor = transform.indptr, transform.indices, transform.anchor
    assert indptr.shape == (n_out + 1,) and indptr[0] == 0 and indptr[-1] == len(indices)
    assert (indptr.diff() >= 1).all()
    assert (indices >= 0).all() and (indices < n).all()
    for row in range(n_out):
        terms = indices[indptr[row] : indptr[row + 1]]
        assert (terms.diff() > 0).all() and anchor[row] in terms
        assert transform.size[row] == len(terms)
    if transform.weights is None:
        assert torch.equal(indices, anchor)
    else:
        assert transform.weights.dtype == torch.float32 and torch.isfinite(transform.weights).all()
        sums = torch.zeros(n_out).index_add_(0, transform.owner, transform.weights)
        torch.testing.assert_close(sums, torch.ones(n_out))


@every_method
@every_encoder
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_laws_hold_for_every_budget(pictures, name: str, encoder: str, grid: Grid) -> None:
    reducer, inputs = begin(pictures, name, encoder, grid)
    previous, n = 0, grid.n_tokens
    for budget in range(1, n + 3):
        n_out = reducer.total(grid, budget)
        assert 1 <= n_out <= (grid.n_tokens if name == "none" else min(budget, grid.n_tokens))
        assert n_out >= previous, "a larger budget never keeps fewer"
        previous = n_out
        if n < 10 or budget in (1, 2, 3, 7, n // 4, n // 2, n - 1, n, n + 2):
            check_laws(reducer.reduce(inputs, budget), inputs, n_out)
    assert reducer.total(grid, grid.n_tokens) == grid.n_tokens


@every_method
@every_encoder
def test_keeping_all_is_the_identity_bit_for_bit(pictures, name: str, encoder: str) -> None:
    reducer, inputs = begin(pictures, name, encoder, Grid(4, 5))
    for budget in (20, 21, 10_000):
        transform = reducer.reduce(inputs, budget)
        assert transform.is_identity
        assert apply(transform, inputs) is inputs.proj


@every_method
@every_encoder
@pytest.mark.parametrize("fill", [0.0, 1.0, -3.5])
def test_blank_picture(pictures, name: str, encoder: str, fill: float) -> None:
    reducer, inputs = begin(pictures, name, encoder, Grid(6, 7), fill=fill)
    for budget in (1, 2, 20, 41):
        out = check_laws(reducer.reduce(inputs, budget), inputs, reducer.total(inputs.grid, budget))
        torch.testing.assert_close(out, inputs.proj[: len(out)], rtol=1e-4, atol=1e-4)


@every_method
@every_encoder
def test_same_inputs_same_bits(pictures, name: str, encoder: str) -> None:
    reducer, inputs = begin(pictures, name, encoder, Grid(7, 8), seed=3)
    first, second = reducer.reduce(inputs, 19), type(reducer)().reduce(dataclasses.replace(inputs), 19)
    for field in ("indptr", "indices", "anchor", "size", "back"):
        assert torch.equal(getattr(first, field), getattr(second, field))
    assert torch.equal(apply(first, inputs), apply(second, inputs))


@every_method
@every_encoder
def test_choice_does_not_depend_on_the_dtype_of_equal_rows(pictures, name: str, encoder: str) -> None:
    reducer, inputs = begin(pictures, name, encoder, Grid(6, 6), seed=5)
    low, high = (as_dtype(as_dtype(inputs, torch.bfloat16), dtype) for dtype in (torch.bfloat16, torch.float32))
    one, other = reducer.reduce(low, 9), reducer.reduce(high, 9)
    assert torch.equal(one.anchor, other.anchor) and torch.equal(one.indices, other.indices)
    assert apply(one, low).dtype == torch.bfloat16


@every_method
@pytest.mark.parametrize("encoder", ["cls", "merging"])
def test_large_picture(pictures, name: str, encoder: str) -> None:
    reducer, inputs = begin(pictures, name, encoder, Grid(64, 64))
    transform = reducer.reduce(inputs, 300)
    assert transform.n_out == reducer.total(inputs.grid, 300)
    assert (transform.anchor.diff() > 0).all()
    assert apply(transform, inputs).shape == (transform.n_out, inputs.proj.shape[1])


@every_method
@every_encoder
def test_features_that_are_not_finite_are_refused_or_not_looked_at(pictures, name: str, encoder: str) -> None:
    reducer, inputs = begin(pictures, name, encoder, Grid(4, 4))

    def poison(rows: Tensor) -> Tensor:
        return rows.index_fill(0, torch.tensor([3]), torch.nan)

    taps = {signal: poison(rows) if signal.kind != "qk" else rows for signal, rows in inputs.taps.items()}
    rows = {f: poison(getattr(inputs, f)) for f in ("proj", "question", "caption") if getattr(inputs, f) is not None}
    poisoned = dataclasses.replace(inputs, taps=taps, **rows)
    try:
        transform = reducer.reduce(poisoned, 5)
    except ImageError as error:
        assert "not finite" in str(error)
    else:
        assert torch.equal(transform.anchor, reducer.reduce(inputs, 5).anchor)


@every_method
@every_encoder
def test_only_what_reads_the_question_depends_on_it(pictures, name: str, encoder: str) -> None:
    """A method that is not question-aware shares its result between prompts, so it must not ask for their text."""
    reducer, inputs = begin(pictures, name, encoder, Grid(5, 6))
    read = {signal.kind for signal in reducer.wanted(pictures.towers[encoder])} & {"question", "caption"}
    assert bool(read) == reducer.question_aware == reducer.reads_question()
    if read:
        silent = {f: inputs.proj[:0] for f in ("question", "caption") if getattr(inputs, f) is not None}
        check_laws(reducer.reduce(dataclasses.replace(inputs, **silent), 11), inputs, reducer.total(inputs.grid, 11))


@every_method
@every_encoder
def test_after_another_stage(pictures, name: str, encoder: str) -> None:
    """A method works on the rows that an earlier method left, or declares that it needs the whole grid."""
    reducer, inputs = begin(pictures, name, encoder, Grid(6, 8))
    if reducer.whole_grid:
        pytest.skip("comes first")
    assert type(reducer).count is Reducer.count, "a count of its own is made on a grid"
    first = TokenTransform.selection(torch.arange(1, 48, 2), 48)
    left = inputs.take(first)
    for budget in (1, 7, 23, 24):
        second = reducer.reduce(left, budget)
        out = check_laws(second, left, budget)
        whole = first.then(second)
        assert whole.n_in == 48 and set(whole.anchor.tolist()) <= set(range(1, 48, 2))
        torch.testing.assert_close(apply(whole, inputs), out, rtol=1e-4, atol=1e-4)
        assert (whole.back[::2] == -1).all()


@every_method
@every_encoder
@pytest.mark.parametrize("way", splits())
def test_tiled_picture(pictures, name: str, encoder: str, way: str) -> None:
    grid = Grid(8, 5, thumbnail=4, row_cuts=(0, 4, 8), col_cuts=(0, 2, 5))  # a thumbnail and four crops
    reducer, split = load_method(family, name)(), build_split(way)
    if not pictures.fits(reducer, encoder):
        pytest.skip("not for this encoder")
    tower = pictures.towers[encoder]
    wanted = reducer.wanted(tower) | {PIXELS, tower.resolve(saliency())}
    inputs = pictures.of_signals(frozenset(wanted), grid, tower)
    assert inputs.n == 16 + 40 and len(grid.tiles) == 5
    for budget in (1, 3, 5, 17, 30, 55):
        transform = reducer.reduce(inputs, budget, split)
        check_laws(transform, inputs, reducer.total(grid, budget))
    assert reducer.reduce(inputs, 56, split).is_identity


def test_a_method_without_any_rule_is_our_own_bug() -> None:
    reducer = Reducer()
    with pytest.raises(AssertionError, match="neither select nor transform"):
        reducer.reduce(VisualInputs(grid=Grid(2, 2), proj=torch.zeros(4, 3)), 2)
