"""Compositions of methods, ways to share one budget, and the transforms that result."""

import dataclasses

import pytest
import torch

from foveate.configs.errors import ConfigError
from foveate.engine.common import Grid, Stage, VisualBudget
from foveate.engine.methods import build, build_split, splits
from foveate.engine.reduce.base import Part, Reducer, parts_of, share, tile_parts


def chain(*stages: Stage) -> Reducer:
    return build(VisualBudget(method="+".join(s.method for s in stages), stages=list(stages)))


@pytest.mark.parametrize("encoder", ["cls", "merging"])
@pytest.mark.parametrize("names", [("pool", "divprune"), ("visionzip", "divprune"), ("fourier", "visionzip"),
                                   ("divprune", "cdpruner", "hiprune")], ids="+".join)  # fmt: skip
def test_a_composition_is_its_stages_one_after_another(pictures, names: tuple[str, ...], encoder: str) -> None:
    reducer = chain(*(Stage(method=name) for name in names))
    inputs = pictures.make(reducer, Grid(8, 8), encoder, seed=1)
    whole = reducer.reduce(inputs, 10)
    assert whole.n_in == 64 and whole.n_out == reducer.total(inputs.grid, 10) == 10
    assert (whole.anchor.diff() > 0).all() and torch.equal(whole.back[whole.anchor], torch.arange(10))
    at = inputs
    for step, stage in zip(reducer.plan(inputs.grid, 10), reducer.stages, strict=True):
        at = at.take(stage.reduce(at, step.budget))
        assert at.n == step.n_left
    assert torch.equal(at.places, whole.anchor)
    out = whole.apply_to(inputs.proj, inputs.enc, inputs.project)
    torch.testing.assert_close(out, at.proj, rtol=1e-4, atol=1e-4)
    assert reducer.reduce(inputs, 64).is_identity


def test_steps_are_even_or_as_stated() -> None:
    grid = Grid(10, 10)
    even = chain(Stage(method="random"), Stage(method="random"))
    assert [s.n_left for s in even.plan(grid, 25)] == [50, 25]
    stated = chain(Stage(method="random", keep=0.8), Stage(method="random", keep=0.5), Stage(method="random"))
    assert [s.n_left for s in stated.plan(grid, 25)] == [80, 40, 25]
    assert [s.n_left for s in stated.plan(grid, 60)] == [80, 60, 60], "no stage goes below the budget"
    assert chain(Stage(method="random"), Stage(method="cdpruner")).reads_question()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((Stage(method="divprune"), Stage(method="pool")), "pool needs what the stage before"),
        ((Stage(method="random", keep=1.5), Stage(method="random")), r"random.keep: 1.5 is not in \(0, 1\]"),
        ((Stage(method="random"), Stage(method="random", keep=0.5)), "the last stage keeps what the budget allows"),
        ((Stage(method="nosuch"), Stage(method="random")), "no 'nosuch'"),
    ],
)
def test_mistakes_are_named(stages: tuple[Stage, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chain(*stages)


def test_ways_to_share() -> None:
    assert splits() == ["area", "information", "thumbnail", "uniform"]
    noise = torch.randint(0, 256, (20, 20, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    parts = [Part(n_tokens=30, pixels=noise * 0), Part(n_tokens=10, pixels=noise)]
    assert build_split("area").weights(parts) == [30, 10]
    assert build_split("uniform").weights(parts) == [1, 1]
    blank, busy = build_split("information").weights(parts)
    assert blank == 30 * 8 and busy > 10 * 8 * 50, "a blank picture counts for something, a busy one for more"
    assert build_split("thumbnail").weights(parts) == [30, 10], "without tiles it is by area"
    with pytest.raises(ConfigError, match="there are area, information"):
        build_split("nosuch")


def test_thumbnail_leads_to_the_crop_it_looks_at(pictures) -> None:
    grid = Grid(8, 8, thumbnail=4, row_cuts=(0, 4, 8), col_cuts=(0, 4, 8))
    way, reducer = build_split("thumbnail"), build(VisualBudget(method="fastervlm"))
    inputs = pictures.make(reducer, grid, "cls")
    attention = torch.full((80,), 0.01)
    attention[[10, 11, 14, 15]] = 1.0  # the lower right quarter of the thumbnail
    inputs = dataclasses.replace(inputs, taps=dict.fromkeys(inputs.taps, attention))
    thumbnail, *crops = share(way, parts_of(inputs, way), grid, 20)
    assert 9 <= thumbnail <= 10 and crops == [1, 1, 1, 20 - 3 - thumbnail]
    kept = reducer.reduce(inputs, 20, way).anchor
    assert kept.shape == (20,) and int((kept < 16).sum()) == thumbnail
    assert share(way, tile_parts(grid), grid, 3) == [3, 0, 0, 0, 0], "fewer than one each: the thumbnail"
