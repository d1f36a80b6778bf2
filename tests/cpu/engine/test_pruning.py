"""Pruning inside the decoder, through the whole engine, against a dense run in which those who left are masked."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import foveate.bundled
import foveate.engine.prune.methods as family
from foveate.engine.common import Failed, Generate, names
from foveate.engine.models.base import Model
from foveate.engine.models.loader import load_model

_spec = importlib.util.spec_from_file_location("pruned_engine", Path(__file__).with_name("pruned_engine.py"))
pruned_engine = importlib.util.module_from_spec(_spec)
sys.modules["pruned_engine"] = pruned_engine  # dataclasses look their module up
_spec.loader.exec_module(pruned_engine)
OURS, Noisy, Watched, ask = (getattr(pruned_engine, name) for name in ("OURS", "Noisy", "Watched", "ask"))

MODELS = ("tiny-llava", "tiny-qwen2-vl")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> Model:
    return load_model(foveate.bundled.path(request.param), torch.float32, "cpu")


@pytest.fixture(scope="module")
def llava() -> Model:
    return load_model(foveate.bundled.path("tiny-llava"), torch.float32, "cpu")


@pytest.mark.parametrize("n_images", [1, 2])
@pytest.mark.parametrize("prune", [*OURS, *names(family)])
def test_a_pruned_run_is_the_masked_dense_one(model, monkeypatch, prune, n_images):
    watched = Watched(model, monkeypatch)
    answers = watched.answers([ask(model, "a", prune, n_images=n_images)])
    request = watched.requests["a"]
    assert not request.depth.is_flat, "the default schedule prunes"
    watched.check("a", answers["a/0"])
    for point, leaves in zip(request.depth.groups[1:], request.depth.decision.kept, strict=True):
        assert len(leaves.keep) == sum(point.counts)


@pytest.mark.parametrize("chunk", [1, 37, 150])
@pytest.mark.parametrize("prune", ["noisy", "mixing", "blind and mixing", "compact", "all out", *names(family)])
def test_any_chunking_keeps_the_same(llava, monkeypatch, prune, chunk):
    """The span waits before the first point until it is complete."""
    if chunk == 1 and prune not in ("mixing", "all out"):
        pytest.skip("one token a step is slow: two methods say it all")
    whole = Watched(llava, monkeypatch)
    one = whole.answers([ask(llava, "a", prune, n_images=2)])
    pieces = Watched(llava, monkeypatch, chunk_tokens=chunk)
    other = pieces.answers([ask(llava, "a", prune, n_images=2)])
    ours, theirs = (w.requests["a"].depth.decision for w in (whole, pieces))
    assert ours.members == theirs.members
    pieces.check("a", other["a/0"])
    assert [t.token_id for t in one["a/0"]] == [t.token_id for t in other["a/0"]]


@pytest.mark.parametrize("prune", ["noisy", "mixing", "blind", "compact"])
def test_mixed_plans_in_one_batch_with_little_memory(llava, monkeypatch, prune):
    """Preempted, computed again, batched with strangers of other plans: the same tokens as alone."""
    generates = [
        ask(llava, "a", prune, seed=1, n_output=40),
        ask(llava, "b", "noisy", seed=2, n_images=2, n_output=40),
        ask(llava, "c", "", seed=3, n_output=40),
        ask(llava, "d", prune, seed=4, n=2, n_output=40),
        ask(llava, "e", "mixing", seed=5, method="divprune", ratio=0.5, n_output=40),
        ask(llava, "f", "blind", seed=1, n_output=40),
    ]
    tight = Watched(llava, monkeypatch, pages_mb=1, chunk_tokens=61, step_tokens=128)
    answers = tight.answers(generates)
    assert tight.engine.heartbeat().preemptions > 0, "the pool is too small for all"
    for generate in generates:
        for choice in range(generate.n):
            tight.check(generate.id, answers[f"{generate.id}/{choice}"])


@pytest.mark.parametrize("prune", ["noisy", "mixing", "blind", "compact", "all out"])
def test_prefixes_are_shared_where_they_may_be(llava, monkeypatch, prune):
    watched = Watched(llava, monkeypatch)
    first = ask(llava, "a", prune)
    watched.answers([first])
    again = ask(llava, "b", prune)
    answers = watched.answers([again])
    watched.check("b", answers["b/0"], like="a")
    n = len(watched.requests["b"].prompt_ids)
    assert n - 4 <= cached(watched, "b") < n, "the same prompt again: all of it but the last block is found"

    other = ask(llava, "c", prune)  # another question about the same picture
    other = Generate(
        **{f: getattr(other, f) for f in other.__struct_fields__} | {"prompt_ids": [*other.prompt_ids[:-3], 9, 8, 7]}
    )
    watched.engine.add(other)
    watched.engine.step()
    request = watched.requests["c"]
    shared = request.sequences[0].cache.n_shared(0)
    assert shared >= request.depth.visual_stop // 4 * 4, "before the first point the picture's blocks are the same"
    watched.engine.abort("c")
    again = Generate(**{f: getattr(other, f) for f in other.__struct_fields__} | {"id": "d"})
    watched.check("d", watched.answers([again])["d/0"], like="a")
    if OURS[prune].question_aware:
        assert cached(watched, "c") == request.depth.start // 4 * 4, "the picture is read again for the new question"
    else:
        assert cached(watched, "c") >= request.depth.stop, "the decision did not depend on the question"


def cached(watched: Watched, name: str) -> int:
    return watched.requests[name].sequences[0].cached_tokens


def test_choices_share_the_pruned_prompt(llava, monkeypatch):
    watched = Watched(llava, monkeypatch)
    answers = watched.answers([ask(llava, "a", "mixing", n=3)])
    for choice in range(3):
        watched.check("a", answers[f"a/{choice}"])
    others = watched.requests["a"].sequences[1:]
    assert all(s.cached_tokens >= s.n_prompt - 4 for s in others)


def test_deeper_layers_hold_fewer_pages(llava, monkeypatch):
    watched = Watched(llava, monkeypatch)
    watched.engine.add(ask(llava, "a", "noisy"))
    while watched.requests["a"].sequences[0].n_output < 2:
        watched.engine.step()
    sequence, pool = watched.requests["a"].sequences[0], watched.engine._space.pool
    depth = sequence.request.depth
    held = [depth.count(g, sequence.n_tokens) for g in range(len(depth.groups))]
    assert held == [len(sequence.request.prompt_ids) + 2 - group.dropped for group in depth.groups]
    pages = sum(-(-n // 4) * len(group.layers) for n, group in zip(held, depth.groups, strict=True))
    assert pool.n_used <= pages + len(depth.groups) and pool.n_used >= pages - len(depth.groups)
    assert pool.n_used < 0.6 * 4 * -(-sequence.n_tokens // 4), "block for block less than a dense prompt"
    usage = sequence.request.visual
    assert usage.kept == 144 and usage.layers[0] == (0, 144) and usage.mean == pytest.approx(144 * 0.5, abs=2)
    watched.engine.abort("a")
    assert pool.n_used == 0
    watched.answers([])


def test_keep_all_is_the_dense_run_bit_for_bit(model, monkeypatch):
    watched = Watched(model, monkeypatch)
    OURS["everything"] = Noisy(shares=(1.0, 1.0))
    try:
        pruned = watched.answers([ask(model, "a", "everything")])["a/0"]
    finally:
        del OURS["everything"]
    dense = Watched(model, monkeypatch).answers([ask(model, "a", "")])["a/0"]
    assert watched.requests["a"].depth.is_flat and watched.requests["a"].visual.method == "none"
    assert [(t.token_id, t.logprob) for t in pruned] == [(t.token_id, t.logprob) for t in dense]


def test_a_budget_is_what_a_layer_holds_on_average(llava, monkeypatch):
    watched = Watched(llava, monkeypatch)
    watched.answers([
        ask(llava, "own", "noisy"),
        ask(llava, "less", "noisy", ratio=0.4),
        ask(llava, "enough", "noisy", ratio=0.9),
        ask(llava, "both", "noisy", method="divprune", ratio=0.25, enter=0.5),
        ask(llava, "on top", "noisy", method="divprune", ratio=0.5),
    ])  # fmt: skip
    mean = {name: request.visual.mean / 144 for name, request in watched.requests.items()}
    kept = {name: request.visual.kept for name, request in watched.requests.items()}
    assert mean["own"] == pytest.approx(0.5, abs=0.01) and mean["enough"] == mean["own"], "its own schedule is enough"
    assert mean["less"] == pytest.approx(0.4, abs=0.01) and kept["less"] == 144
    assert mean["both"] == pytest.approx(0.25, abs=0.01) and kept["both"] == 72
    assert kept["on top"] == 72 and mean["on top"] == pytest.approx(0.25, abs=0.01)
    for name, request in watched.requests.items():
        assert request.visual.method == ("divprune+noisy" if name in ("both", "on top") else "noisy")


def test_too_small_a_budget_is_refused_with_what_is_possible(llava, monkeypatch):
    watched = Watched(llava, monkeypatch)
    watched.engine.add(ask(llava, "a", "noisy", ratio=0.2))
    [event] = watched.engine.step()
    assert isinstance(event, Failed) and event.code != "internal_error"
    assert "0.25" in event.message and "a+b" in event.message and event.param == "vlm.visual.method"


def test_newlines_of_a_tiled_picture_stay(monkeypatch, tmp_path):
    """The bundled LLaVA, dressed as a LLaVA-NeXT: what separates its rows is text, and leaves nowhere."""
    shutil.copytree(foveate.bundled.path("tiny-llava"), tmp_path, dirs_exist_ok=True)
    for name, more in (
        ("config", {"model_type": "llava_next", "image_grid_pinpoints": [[168, 336], [336, 336]]}),
        ("preprocessor_config", {"image_processor_type": "LlavaNextImageProcessor"}),
    ):
        file = tmp_path / f"{name}.json"
        own = json.loads(file.read_text()) | {"image_grid_pinpoints": [[168, 336], [336, 336]]} | more
        file.write_text(json.dumps(own))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["image_newline"] = torch.randn(192, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_model(tmp_path, torch.float32, "cpu")
    watched = Watched(model, monkeypatch)
    answers = watched.answers([ask(model, name, name) for name in ("noisy", "all out", "feather", "visiondrop2")])
    for name in ("noisy", "all out", "feather", "visiondrop2"):
        watched.check(name, answers[f"{name}/0"])
        request = watched.requests[name]
        grid, run = request.pictures[0].grid, request.runs[0]
        newlines = set(range(run.start, run.stop)) - {run.start + token for token in grid.tokens()}
        assert len(newlines) == grid.rows == request.depth.n_newlines
        assert all(newlines <= set(members) for members in request.depth.decision.members)
        assert request.visual.layers[-1][1] == sum(request.depth.groups[-1].counts) + grid.rows
