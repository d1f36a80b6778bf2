"""Whatever one request does wrong, the others never notice."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.configs.config import CacheConfig, Config, ModelConfig
from foveate.configs.errors import ConfigError
from foveate.engine import sampler
from foveate.engine.common import (
    Delta,
    DeviceLostError,
    Failed,
    Generate,
    Grid,
    Image,
    ModelError,
    SamplingParams,
    Signal,
    VisualBudget,
)
from foveate.engine.encoder import FeatureCache, Features
from foveate.engine.engine import Engine, Event
from foveate.engine.reduce.methods import uniform
from foveate.engine.sampler import Draw
from foveate.engine.vision import VisualInputs

MakeEngine = Callable[..., Engine]
Run = Callable[[Engine], list[Event]]
MakePicture = Callable[..., Image]
IMAGE_ID, NAN_PIXEL, RAISING_PIXEL = 256, 251, 252
GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


def request(id: str, ids: list[int], *images: Image, **more: Any) -> Generate:
    return Generate(id=id, prompt_ids=ids, images=list(images), **{"sampling": GREEDY, **more})


def tokens(events: list[Event], id: str) -> list[int]:
    return [token for e in events if isinstance(e, Delta) and e.id == id for token in e.token_ids]


def failures(events: list[Event]) -> list[Failed]:
    return [event for event in events if isinstance(event, Failed)]


@pytest.fixture
def beside(make_engine: MakeEngine, run: Run, picture: MakePicture) -> Callable[..., Failed]:
    """Run a request that fails beside two that must not notice; return its failure."""

    def check(bad: Generate) -> Failed:
        good = [request("good", [1, IMAGE_ID, 2, 3], picture(50)), request("text", list(range(30)))]
        quiet, engine = make_engine(), make_engine(chunk_tokens=8)
        for generate in good:
            quiet.add(generate)
        expected = run(quiet)
        for generate in (good[0], bad, good[1]):
            engine.add(generate)
        events = run(engine)
        for generate in good:
            assert tokens(events, generate.id) == tokens(expected, generate.id) != []
        [failed] = failures(events)
        assert failed.id == bad.id
        engine.add(request("again", [1, IMAGE_ID, 2, 3], picture(50)))
        assert tokens(run(engine), "again") == tokens(expected, "good"), "and it goes on"
        return failed

    return check


def test_a_picture_whose_features_are_not_finite(beside: Callable[..., Failed], picture: MakePicture) -> None:
    failed = beside(request("bad", [5, IMAGE_ID, 6], picture(1, first=NAN_PIXEL), n=3))
    assert failed.code == "invalid_image" and "not finite" in failed.message


def test_a_picture_that_breaks_the_tower(beside: Callable[..., Failed], picture: MakePicture) -> None:
    assert beside(request("bad", [5, IMAGE_ID, 6], picture(1, first=RAISING_PIXEL))).code == "internal_error"


@pytest.mark.parametrize("same_picture", [False, True])
def test_a_signal_that_breaks_the_tower_fails_the_method_that_reads_it(
    make_engine: MakeEngine, run: Run, picture: MakePicture, model: Any, monkeypatch: pytest.MonkeyPatch,
    same_picture: bool,
) -> None:  # fmt: skip
    """The pictures of one step share a run of the tower, and one picture may be wanted with different signals."""
    encode = model.encode

    def broken(images: Any, signals: frozenset[Signal], originals: Any = None) -> Any:
        if any(signal.kind == "recv" for signal in signals):
            raise ValueError("no such signal")
        return encode(images, signals, originals)

    monkeypatch.setattr(model, "encode", broken)
    engine = make_engine()
    budgets = [VisualBudget(method=name, tokens=4) for name in ("uniform", "foveal", "uniform", "visionzip")]
    for i, visual in enumerate([*budgets, VisualBudget(method="none")]):
        engine.add(request(str(i), [5, IMAGE_ID, 6], picture(0 if same_picture else i), visual=visual))
    reads = {id for id, r in engine._requests.items() if any(signal.kind == "recv" for signal in r.signals)}
    assert 0 < len(reads) < 5, "some of these methods read the signal"
    events = run(engine)
    assert {f.id for f in failures(events)} == reads
    assert all(len(tokens(events, str(i))) == 6 for i in range(5) if str(i) not in reads)


def test_a_tower_that_gives_too_few_pictures(
    make_engine: MakeEngine, run: Run, picture: MakePicture, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = model.encode

    def lacking(images: Any, *rest: Any) -> Any:
        return [out for image, out in zip(images, encode(images, *rest), strict=True) if int(image[0, 0, 0]) != 7]

    monkeypatch.setattr(model, "encode", lacking)
    engine = make_engine()
    for i in range(5):
        engine.add(request(str(i), [5, IMAGE_ID, 6], picture(i, first=7 if i == 3 else 0)))
    events = run(engine)
    assert [f.id for f in failures(events)] == ["3"]
    assert all(len(tokens(events, str(i))) == 6 for i in (0, 1, 2, 4))


def test_a_count_of_tokens_that_breaks_off_is_made_anew(
    make_engine: MakeEngine, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Penalties read a count that is kept with the sequence; a draw that is repeated must not count twice."""
    sampling = SamplingParams(temperature=0.0, max_tokens=12, frequency_penalty=0.05)
    quiet, engine = make_engine(), make_engine()
    for generate in texts(4, sampling=sampling):
        quiet.add(generate)
        engine.add(generate)
    expected = run(quiet)
    count, calls = sampler._Seen.catch_up, [0]

    def broken(self: Any, token_ids: Any, n_prompt: int) -> None:
        calls[0] += 1
        if calls[0] % 5 == 1:
            self._counts += 100
            raise RuntimeError("a passing trouble")
        count(self, token_ids, n_prompt)

    monkeypatch.setattr(sampler._Seen, "catch_up", broken)
    events = run(engine)
    assert not failures(events) and calls[0] > 40
    for i in range(4):
        assert tokens(events, f"r{i}") == tokens(expected, f"r{i}") != []


def test_a_reducer_that_raises(
    beside: Callable[..., Failed], picture: MakePicture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Tensor:
        raise ZeroDivisionError("a reducer broke")

    monkeypatch.setattr(uniform.METHOD, "select", broken)
    visual = VisualBudget(tokens=4, method="uniform")
    failed = beside(request("bad", [5, IMAGE_ID, 6], picture(1), visual=visual))
    assert failed.code == "internal_error" and "a reducer broke" in failed.message


def test_logits_that_are_not_finite(beside: Callable[..., Failed], model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token 77 poisons its own sequence's cache and logits; its blocks are not found again."""
    poisoned = model.table.clone()
    poisoned[77] = torch.nan
    monkeypatch.setattr(model, "table", torch.nn.Parameter(poisoned, requires_grad=False))
    failed = beside(request("bad", [77, *range(40, 60)], n=2))
    assert failed.code == "internal_error" and "not finite" in failed.message


def texts(how_many: int, **more: Any) -> list[Generate]:
    """Different requests of 12 tokens and more; none holds the token 99."""
    return [request(f"r{i}", [20 + i, *range(40, 51 + i)], **more) for i in range(how_many)]


def spoil(generate: Generate, at: int) -> Generate:
    """The request with token 99, on which the model raises, in its prompt; at -1 as its second output token."""
    ids = list(generate.prompt_ids)
    if at >= 0:
        ids[at] = 99
        return request(generate.id, ids, n=generate.n)
    sampling = SamplingParams(temperature=0.0, max_tokens=6, logit_bias={99: 1e6})
    return request(generate.id, ids, n=generate.n, sampling=sampling)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("at", [0, 11, -1], ids=["first token", "second chunk", "decode"])
@pytest.mark.parametrize("culprits", [[0], [5], [3, 4], [0, 2, 5], list(range(6))], ids=str)
def test_a_forward_that_raises_fails_only_the_requests_that_cause_it(
    make_engine: MakeEngine, run: Run, model: Any, culprits: list[int], at: int, n: int
) -> None:
    sampled = SamplingParams(temperature=1.0, seed=3, max_tokens=6, logit_bias={99: -1e6})
    good = texts(6, n=n, sampling=sampled)
    quiet = make_engine()
    for generate in good:
        quiet.add(generate)
    expected = run(quiet)
    engine = make_engine(chunk_tokens=8)
    model.raise_on_token = 99
    for i, generate in enumerate(good):
        engine.add(spoil(generate, at) if i in culprits else generate)
    events = run(engine)
    assert sorted((f.id, f.code) for f in failures(events)) == [(f"r{i}", "internal_error") for i in culprits]
    assert all("the forward broke" in failed.message for failed in failures(events))
    for i, generate in enumerate(good):
        for choice in range(n if i not in culprits else 0):
            ours, theirs = (
                [
                    t
                    for e in those
                    if isinstance(e, Delta) and (e.id, e.choice) == (generate.id, choice)
                    for t in e.token_ids
                ]
                for those in (events, expected)
            )
            assert ours == theirs != []


def test_a_forward_that_raises_once_fails_nobody(
    make_engine: MakeEngine, run: Run, model: Any, monkeypatch: Any
) -> None:
    engine, raised = make_engine(), []
    embed = model.embed

    def once(token_ids: Tensor) -> Tensor:
        if not raised:
            raised.append(True)
            raise RuntimeError("a passing trouble")
        return embed(token_ids)

    monkeypatch.setattr(model, "embed", once)
    for generate in texts(3):
        engine.add(generate)
    events = run(engine)
    assert not failures(events) and all(len(tokens(events, f"r{i}")) == 6 for i in range(3))


def test_the_log_has_the_traceback_with_the_request(
    make_engine: MakeEngine, run: Run, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine()
    model.raise_on_token = 99
    for i, generate in enumerate(texts(4)):
        engine.add(spoil(generate, 0) if i == 2 else generate)
    run(engine)
    (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
    assert record.getMessage() == "request r2 failed" and record.exc_info is not None


def test_a_sampler_that_raises_fails_its_row(
    make_engine: MakeEngine, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet, engine = make_engine(), make_engine()
    for generate in texts(4):
        quiet.add(generate)
    expected = run(quiet)
    for i, generate in enumerate(texts(4)):
        bad = request(generate.id, generate.prompt_ids, n=2, sampling=SamplingParams(seed=-77, max_tokens=6))
        engine.add(bad if i == 1 else generate)
    law = Draw.law.fget
    assert law is not None

    def broken(draw: Draw) -> object:
        if draw.params.seed == -77 and draw.index == 2:
            raise ZeroDivisionError("a law broke")
        return law(draw)

    monkeypatch.setattr(Draw, "law", property(broken))
    events = run(engine)
    assert [(f.id, f.code) for f in failures(events)] == [("r1", "internal_error")]
    for i in (0, 2, 3):
        assert tokens(events, f"r{i}") == tokens(expected, f"r{i}") != []


def test_a_request_that_cannot_be_resolved_fails_alone(
    make_engine: MakeEngine, run: Run, model: Any, monkeypatch: pytest.MonkeyPatch, picture: MakePicture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a geometry broke")

    engine = make_engine()
    with monkeypatch.context() as patch:
        patch.setattr(model.geometry, "grid", broken)
        engine.add(request("bad", [1, IMAGE_ID], picture(3)))
    engine.add(request("good", [1, 2]))
    events = run(engine)
    assert [(f.id, f.code) for f in failures(events)] == [("bad", "internal_error")] and len(
        tokens(events, "good")
    ) == 6


@pytest.mark.parametrize("place", ["embed", "encode"])
def test_a_lost_device_ends_the_engine(
    make_engine: MakeEngine, run: Run, model: Any, picture: MakePicture, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")

    engine = make_engine()
    engine.add(request("a", [1, IMAGE_ID, 2], picture(3)))
    engine.add(request("b", [1, 2, 3]))
    with monkeypatch.context() as patch, pytest.raises(DeviceLostError, match=r"^the device failed: CUDA error.*d$"):
        patch.setattr(model, place, lost)
        engine.step()
    run(engine)


def test_too_little_memory_for_a_batch_is_no_lost_device(
    make_engine: MakeEngine, run: Run, model: Any, monkeypatch: Any
) -> None:
    engine = make_engine()
    embed = model.embed

    def small(token_ids: Tensor) -> Tensor:
        if len(token_ids) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return embed(token_ids)

    monkeypatch.setattr(model, "embed", small)
    for generate in texts(4):
        engine.add(generate)
    engine.add(request("large", list(range(30))))
    events = run(engine)
    assert [f.id for f in failures(events)] == ["large"]
    assert all(len(tokens(events, f"r{i}")) == 6 for i in range(4))


BAD: dict[str, tuple[dict[str, Any], str, str | None, str]] = {
    "empty": ({"prompt_ids": []}, "invalid_request", "messages", "empty"),
    "unknown token": ({"prompt_ids": [1, 260]}, "invalid_request", "messages", "260"),
    "negative token": ({"prompt_ids": [-1]}, "invalid_request", "messages", "-1"),
    "typed placeholder": ({"prompt_ids": [1, IMAGE_ID]}, "invalid_request", "messages", "1 image placeholders"),
    "no choice": ({"n": 0}, "invalid_request", "n", "0"),
    "no token": ({"sampling": SamplingParams(max_tokens=0)}, "invalid_request", "max_tokens", "0"),
    "bias": ({"sampling": SamplingParams(logit_bias={300: 1.0})}, "invalid_request", "logit_bias", "300"),
    "stop": ({"sampling": SamplingParams(stop_token_ids=(-5,))}, "invalid_request", "stop_token_ids", "-5"),
    "too long": ({"prompt_ids": [1] * 400}, "context_length_exceeded", "messages",
                 "prompt is too long for the maximum context length: 400 text tokens + 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_request_that_is_wrong_is_refused_by_name(beside: Callable[..., Failed], name: str) -> None:
    fields, code, param, words = BAD[name]
    failed = beside(Generate(**{"id": "bad", "prompt_ids": [1], **fields}))
    assert (failed.code, failed.param) == (code, param) and words in failed.message


def test_wrong_budgets_are_refused_by_name(beside: Callable[..., Failed], picture: MakePicture) -> None:
    image = picture(1, 24, 24)
    for visual, code, param in (
        (VisualBudget(method="divprun", tokens=4), "invalid_vlm_parameter", "vlm.visual.method"),
        (VisualBudget(params={"nope": 1}, tokens=4), "invalid_vlm_parameter", "vlm.visual.method"),
        (VisualBudget(fit=False), "context_length_exceeded", "messages"),
        (VisualBudget(floor=500), "context_length_exceeded", "messages"),
    ):
        failed = beside(request("bad", [IMAGE_ID], image, visual=visual))
        assert (failed.code, failed.param) == (code, param), failed
        if code == "context_length_exceeded":  # each phrase is what some client libraries look for
            assert "prompt is too long" in failed.message and "maximum context length" in failed.message
    truncated = Image(pixels=b"123", height=4, width=4, digest=b"")
    assert beside(request("bad", [IMAGE_ID], truncated)).code == "invalid_image"


def test_a_full_queue_refuses(make_engine: MakeEngine, run: Run) -> None:
    engine = make_engine(max_waiting=2, max_running=1)
    for i in range(5):
        engine.add(request(str(i), [i, 1], n=2))
    events = engine.take_events()
    assert [(f.id, f.code) for f in failures(events)] == [("2", "queue_full"), ("3", "queue_full"), ("4", "queue_full")]
    events = run(engine)
    assert [len(tokens(events, str(i))) for i in range(5)] == [12, 12, 0, 0, 0]
    engine.add(request("5", [1]))
    assert len(tokens(run(engine), "5")) == 6


def test_an_id_in_use_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add(request("a", [1]))
    engine.add(request("a", [2]))
    assert [f.code for f in failures(engine.take_events())] == ["invalid_request"]


def test_settings_that_do_not_fit_the_model_are_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"model\.max_context: 401"):
        Engine(model, Config(model=ModelConfig(max_context=401)))
    with pytest.raises(ConfigError, match=r"cache\.memory_mb: 1"):
        Engine(model, Config(cache=CacheConfig(memory_mb=1, block_tokens=1024)))


def test_warm_up_counts_as_nothing_and_fails_on_a_broken_model(make_engine: MakeEngine, model: Any) -> None:
    engine = make_engine()
    engine.warm_up()
    beat = engine.heartbeat()
    assert beat.steps == beat.output_tokens == 0 and model.n_forwards == 2
    model.raise_on_token = 0
    with pytest.raises(ModelError, match="the forward broke"):
        engine.warm_up()


def test_the_feature_cache_stays_within_its_bytes() -> None:
    def features(n: int) -> Features:
        return Features(VisualInputs(grid=Grid(1, n), proj=torch.zeros(n, 4)), frozenset({Signal("recv", 1)}))

    cache = FeatureCache(16 * 10)
    for i, n in enumerate((4, 4, 3)):
        cache.put(bytes([i]), features(n))
        cache.check()
    assert cache.get(b"\0", frozenset()) is None, "the oldest went"
    assert cache.get(b"\1", frozenset({Signal("recv", 1)})) and cache.get(b"\1", frozenset({Signal("keys", 1)})) is None
    cache.put(b"\3", features(5))
    assert cache.get(b"\2", frozenset()) is None and cache.get(b"\1", frozenset()), "least recently used first"
    cache.put(b"\4", features(11))
    assert cache.get(b"\4", frozenset()) is None and cache.n_bytes <= 160
    cache.put(b"\1", features(1))
    cache.check()
