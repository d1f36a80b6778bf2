"""Cuts before and inside the tower, on tiny checkpoints: against the dense tower with keys masked, and served."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.configs.config import CacheConfig, Config
from foveate.engine.common import (
    CELLS,
    ENC,
    Accepted,
    Delta,
    Failed,
    Generate,
    Image,
    SamplingParams,
    Signal,
    Stage,
    VisualBudget,
)
from foveate.engine.engine import Engine
from foveate.engine.models.base import Model
from foveate.engine.models.loader import load_model
from foveate.engine.models.parts import tower as parts
from foveate.engine.reduce.methods.evit import EViT
from foveate.engine.reduce.methods.expedite import Expedite
from foveate.engine.reduce.methods.tome import ToMe
from foveate.engine.vision import LayerCut, TowerCut, VisualInputs

TOWERS = ["clip", "siglip", "qwen2_vl", "qwen2_5_vl"]
every_tower = pytest.mark.parametrize("tower", TOWERS)
Attention = Callable[..., Tensor]


@pytest.fixture(scope="module")
def load(tiny_models: Any, tmp_path_factory: Any) -> Callable[[str], Any]:
    models: dict[str, Any] = {}

    def get(tower: str) -> Any:
        if tower not in models:
            path: Path = tmp_path_factory.mktemp(tower)
            if tower in ("clip", "siglip"):
                tiny_models.save_llava(path, vision=tower, select=-1, seed=3)
            else:
                tiny_models.save_qwen(path, family=tower, seed=3)
            models[tower] = load_model(path, torch.float32, "cpu")
        return models[tower]

    return get


def picture(model: Model, tiny_models: Any, seed: int = 0) -> Tensor:
    ready = model.processor.prepare(tiny_models.picture(40, 56, seed))
    return torch.frombuffer(bytearray(ready.tobytes()), dtype=torch.uint8).view(ready.height, ready.width, 3)


def everything(model: Model) -> frozenset[Signal]:
    tower = model.spec.tower
    kinds = ["saliency", "recv", "keys", "values", "hidden", "qk"]
    found = {tower.resolve(Signal(kind, layer)) for kind in kinds for layer in range(tower.depth)}
    return frozenset(found | {CELLS} | ({ENC} if not tower.merges else set()))


def cells_of(model: Model, pixels: Tensor, seed: int = 0) -> Tensor:
    n = model.geometry.grid(*pixels.shape[:2]).n_tokens
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: n // 2].sort().values


def rows_of(model: Model, cells: Tensor, pixels: Tensor) -> Tensor:
    """Rows of the dense tower, in its order, that belong to given cells."""
    tower = getattr(model, "visual", None)
    if tower is None:
        return cells + int(model.spec.tower.has_cls)
    order = tower.plan([model.geometry.grid(*pixels.shape[:2])]).order
    order = torch.arange(int(model.geometry.grid(*pixels.shape[:2]).n_tokens)) if order is None else order
    return torch.isin(order, cells).repeat_interleave(tower.config.cell).nonzero()[:, 0]


def mask(monkeypatch: pytest.MonkeyPatch, dropped: Tensor, first_layer: int) -> None:
    """From a layer on, no query of the dense tower sees the dropped rows."""
    layers = iter(range(100))

    def masked(q: Tensor, k: Tensor, v: Tensor, bounds: list[int], scale: float) -> Tensor:
        hidden = torch.zeros(len(q), dtype=torch.bool)
        if next(layers) >= first_layer:
            hidden[dropped] = True
        out = torch.zeros_like(q)
        for a, b in zip(bounds[:-1], bounds[1:], strict=True):
            if not hidden[a:b].all():
                scores = torch.einsum("mhd,lhd->hml", q[a:b], k[a:b]) * scale
                weights = scores.masked_fill(hidden[a:b], -torch.inf).softmax(-1)
                out[a:b] = torch.einsum("hml,lhd->mhd", weights, v[a:b])
        return out

    monkeypatch.setattr(parts, "vision_attention", masked)


def check_equal(ours: VisualInputs, dense: VisualInputs, cells: Tensor, signals: frozenset[Signal]) -> None:
    assert ours.places is not None and torch.equal(ours.places, cells)
    torch.testing.assert_close(ours.proj, dense.proj[cells], rtol=1e-4, atol=1e-4)
    for signal in signals:
        if signal.kind in ("keys", "values", "hidden"):
            torch.testing.assert_close(ours.taps[signal], dense.taps[signal][cells], rtol=1e-4, atol=1e-4)
    for field in ("enc", "cells"):
        if (one := getattr(ours, field)) is not None:
            torch.testing.assert_close(one, getattr(dense, field)[cells], rtol=1e-4, atol=1e-4)


@every_tower
def test_a_tower_that_cuts_nothing_is_the_dense_one_bit_for_bit(load, tiny_models, tower: str) -> None:
    model = load(tower)
    pixels, signals = picture(model, tiny_models), everything(model)
    (dense,) = model.encode([pixels], signals)
    nothing = model.encode_cut(pixels, signals, TowerCut(None, (), frozenset()))
    every = model.encode_cut(pixels, signals, TowerCut(torch.arange(dense.n), (), frozenset()))
    for ours in (nothing, every):
        assert ours.places is None and torch.equal(ours.proj, dense.proj)
        assert ours.taps.keys() == dense.taps.keys()
        for signal, values in dense.taps.items():
            assert torch.equal(ours.taps[signal], values), signal


@every_tower
def test_cells_not_read_are_keys_masked_from_the_first_layer_on(load, tiny_models, monkeypatch, tower: str) -> None:
    model = load(tower)
    pixels, signals = picture(model, tiny_models), everything(model)
    cells = cells_of(model, pixels)
    ours = model.encode_cut(pixels, signals, TowerCut(cells, (), frozenset()))
    n = model.geometry.grid(*pixels.shape[:2]).n_tokens
    dropped = rows_of(model, torch.tensor([i for i in range(n) if i not in cells.tolist()]), pixels)
    mask(monkeypatch, dropped, 0)
    (dense,) = model.encode([pixels], signals)
    check_equal(ours, dense, cells, signals)
    for signal in signals:
        if signal.kind == "recv":
            assert ours.taps[signal].shape == (len(cells),)
        if signal.kind == "qk":
            full = ours.full(signal.layer)
            assert full.shape == (len(cells), len(cells))
            if not model.spec.tower.has_cls:
                one = torch.ones(len(cells)) / (4 if model.spec.tower.merges else 1)  # a mean over patches
                torch.testing.assert_close(full.sum(1), one)


@every_tower
@pytest.mark.parametrize("with_cells", [False, True])
def test_rows_dropped_after_a_layer_are_keys_masked_from_the_next_on(
    load, tiny_models, monkeypatch, tower: str, with_cells: bool
) -> None:
    model = load(tower)
    pixels, signals = picture(model, tiny_models), everything(model)
    n, method = model.geometry.grid(*pixels.shape[:2]).n_tokens, EViT(layer=0.0, cuts=1, fuse=False)
    (layer,) = method.layers(model.spec.tower)
    read = cells_of(model, pixels) if with_cells else torch.arange(n)
    step = LayerCut(layer, method, len(read) // 2, False, False)
    needs = frozenset(model.spec.tower.resolve(signal) for signal in method.signals_at(layer))
    ours = model.encode_cut(pixels, signals, TowerCut(read if with_cells else None, (step,), needs))
    assert ours.places is not None and ours.n == len(read) // 2

    whole = model.encode_cut(pixels, signals, TowerCut(read, (), frozenset()))  # with the keys that are left masked
    expected = read[torch.sort(whole.saliency(layer), descending=True, stable=True).indices[: ours.n]].sort().values
    assert torch.equal(ours.places, expected)
    if not with_cells:
        dropped = rows_of(model, torch.tensor([i for i in range(n) if i not in expected.tolist()]), pixels)
        mask(monkeypatch, dropped, layer + 1)
        (dense,) = model.encode([pixels], signals)
        check_equal(ours, dense, expected, signals)


@every_tower
@pytest.mark.parametrize("method", [EViT(layer=0.0), ToMe(), ToMe(proportional=False), Expedite(start=0.0)])
def test_rows_are_merged_on_the_way(load, tiny_models, tower: str, method: Any) -> None:
    model = load(tower)
    pixels, signals = picture(model, tiny_models), everything(model)
    spec, n = model.spec.tower, model.geometry.grid(*pixels.shape[:2]).n_tokens
    layers = method.layers(spec)
    k = method.count(model.geometry.grid(*pixels.shape[:2]), n // 3)
    steps = tuple(
        LayerCut(layer, method, count, False, False)
        for layer, count in zip(layers, method.counts(n, k, len(layers)), strict=True)
    )
    needs = frozenset(spec.resolve(signal) for layer in layers for signal in method.signals_at(layer))
    ours = model.encode_cut(pixels, signals, TowerCut(None, steps, needs))
    assert ours.n == k and ours.places is not None and (ours.places.diff() > 0).all()
    assert torch.isfinite(ours.proj).all()
    for signal, values in ours.taps.items():
        assert signal in signals and (signal.kind == "qk" or len(values) == k)
    again = model.encode_cut(pixels, frozenset(), TowerCut(None, steps, needs))
    assert torch.equal(again.proj, ours.proj) and not again.taps


@every_tower
def test_clusters_of_one_row_each_come_back_as_they_went(load, tiny_models, tower: str) -> None:
    """With every row its own cluster nothing is lost, whatever order the tower keeps its rows in."""
    model = load(tower)
    pixels, signals = picture(model, tiny_models), everything(model)
    (dense,) = model.encode([pixels], signals)
    method = Expedite(start=0.0, stop=1.0, near=1)
    (layer,), back = method.layers(model.spec.tower), method.back_layer(model.spec.tower)
    steps = (LayerCut(layer, method, dense.n, False, True), LayerCut(back, method, dense.n, True, False))
    ours = model.encode_cut(pixels, signals, TowerCut(None, steps, frozenset()))
    assert ours.places is None
    torch.testing.assert_close(ours.proj, dense.proj, rtol=1e-4, atol=1e-4)
    for signal in signals - {CELLS, ENC}:
        if signal.kind != "qk":
            torch.testing.assert_close(ours.taps[signal], dense.taps[signal], rtol=1e-4, atol=1e-4)
    fewer = (LayerCut(layer, method, method.count(dense.grid, 5), False, True), steps[1])
    blurred = model.encode_cut(pixels, signals, TowerCut(None, fewer, frozenset()))
    assert blurred.n == dense.n and torch.isfinite(blurred.proj).all()
    assert all(signal.kind == "qk" or len(values) == dense.n for signal, values in blurred.taps.items())


def half_blank(model: Model, tiny_models: Any) -> Image:
    pixels = picture(model, tiny_models, 5).clone()
    pixels[pixels.shape[0] // 2 :] = 255
    raw = pixels.numpy().tobytes()
    return Image(pixels=raw, height=pixels.shape[0], width=pixels.shape[1], digest=sha256(raw).digest())


def ask(engine: Engine, name: str, image: Image, visual: VisualBudget) -> tuple[Accepted, Delta]:
    sampling = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    engine.add(
        Generate(
            id=name, prompt_ids=[5, 90, 7, 8], images=[image], visual=visual, sampling=sampling, explain="kept_map"
        )
    )
    events = []
    while engine.has_work:
        events += engine.step()
        engine.check()
    assert not [event for event in events if isinstance(event, Failed)], events
    return events[0], events[-1]


def composed(text: str) -> VisualBudget:
    stages = []
    for part in text.split("+"):
        name, *settings = part.split(";")
        values = {key: float(value) for key, value in (setting.split("=") for setting in settings)}
        stages.append(Stage(method=name, keep=values.pop("keep", None), params=values))
    if len(stages) == 1:
        return VisualBudget(tokens=5, method=text)
    return VisualBudget(tokens=5, method="+".join(stage.method for stage in stages), stages=stages)


@every_tower
@pytest.mark.parametrize(
    "text",
    ["pixelprune", "pixelprune+divprune", "evit", "evit;layer=0.5;keep=0.6+divprune", "tome", "expedite+pool",
     "expedite;keep=0.5+hiprune", "pixelprune+evit+visionzip", "tome+todre", "mctf"],
)  # fmt: skip
def test_cuts_run_in_the_engine(load, tiny_models, tower: str, text: str) -> None:
    model = load(tower)
    engine = Engine(model, Config(cache=CacheConfig(memory_mb=1, block_tokens=4)))
    image, visual = half_blank(model, tiny_models), composed(text)
    accepted, end = ask(engine, "a", image, visual)
    assert isinstance(accepted, Accepted) and end.usage is not None
    (kept,) = end.usage.kept
    assert accepted.visual.kept == len(kept) <= 5 and kept == sorted(set(kept))
    assert len(kept) == 5 or "pool" in text
    _, again = ask(engine, "b", image, visual)
    assert again.usage is not None and again.usage.kept == [kept] and again.usage.encoder_hits == 1
    assert again.token_ids == end.token_ids


@every_tower
def test_pixelprune_alone_drops_what_repeats_and_no_more(load, tiny_models, monkeypatch, tower: str) -> None:
    model = load(tower)
    engine = Engine(model, Config(cache=CacheConfig(memory_mb=1, block_tokens=4)))
    image = half_blank(model, tiny_models)
    n = model.geometry.grid(image.height, image.width).n_tokens
    read: list[int] = []
    encode_cut = model.encode_cut

    def counted(pixels: Tensor, signals: frozenset[Signal], cut: TowerCut) -> VisualInputs:
        assert cut.cells is not None
        read.append(len(cut.cells))
        return encode_cut(pixels, signals, cut)

    monkeypatch.setattr(model, "encode_cut", counted)
    accepted, _ = ask(engine, "a", image, VisualBudget(method="pixelprune"))
    assert read == [accepted.visual.kept] and n / 2 - 1 <= read[0] < n
    floored, _ = ask(engine, "b", image, VisualBudget(method="pixelprune", floor=n - 1))
    assert floored.visual.kept == n - 1 and read[-1] == n - 1
    full, _ = ask(engine, "c", image, VisualBudget(method="pixelprune", fit=False))
    assert full.visual.kept == n and len(read) == 2
    few, _ = ask(engine, "d", image, VisualBudget(method="pixelprune", tokens=3))
    assert few.visual.kept == 3 and read[-1] == 3


def test_where_the_tower_cannot_be_cut_the_same_happens_after_it(tiny_models, tmp_path) -> None:
    tiny_models.save_tiled(tmp_path)
    model = load_model(tmp_path, torch.float32, "cpu")
    engine = Engine(model, Config(cache=CacheConfig(memory_mb=1, block_tokens=4)))
    ready = model.processor.prepare(tiny_models.picture(30, 30, 1))
    raw = ready.tobytes()
    image = Image(pixels=raw, height=ready.height, width=ready.width, digest=sha256(raw).digest())
    for text in ("pixelprune", "evit", "pixelprune+divprune", "expedite+pool", "tome+visionzip"):
        accepted, end = ask(engine, text, image, composed(text))
        assert end.usage is not None and accepted.visual.kept == len(end.usage.kept[0])
        assert accepted.visual.kept == 5 or "pool" in text
