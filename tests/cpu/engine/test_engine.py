"""The engine on the mock model: what a client may rely on."""

import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from foveate.engine.common import Accepted, Delta, Failed, Generate, Image, SamplingParams, VisualBudget
from foveate.engine.engine import Engine, Event

MakeEngine = Callable[..., Engine]
Run = Callable[[Engine], list[Event]]
MakePicture = Callable[..., Image]
IMAGE_ID = 256


def greedy(id: str, ids: list[int], images: list[Image] | None = None, n_max: int = 8, **more: Any) -> Generate:
    sampling = SamplingParams(temperature=0.0, max_tokens=n_max)
    return Generate(id=id, prompt_ids=ids, images=images or [], sampling=more.pop("sampling", sampling), **more)


def answers(events: list[Event]) -> dict[tuple[str, int], list[int]]:
    """Tokens by request and choice; every choice ends once."""
    found: dict[tuple[str, int], list[int]] = {}
    ended: list[tuple[str, int]] = []
    for event in events:
        assert not isinstance(event, Failed), event
        if isinstance(event, Delta):
            assert (event.id, event.choice) not in ended, "nothing comes after the end"
            found.setdefault((event.id, event.choice), []).extend(event.token_ids)
            if event.finish:
                assert event.usage is not None
                ended.append((event.id, event.choice))
    assert len(ended) == len(set(ended)) == len(found), "each choice ends exactly once"
    return found


def ends(events: list[Event]) -> list[Delta]:
    return [e for e in events if isinstance(e, Delta) and e.finish]


def requests(picture: MakePicture) -> list[Generate]:
    """A dozen unlike ones: text, one and two images, budgets and methods, shared beginnings."""
    rng = random.Random(0)
    text = [[rng.randrange(256) for _ in range(n)] for n in (3, 17, 50, 70)]
    made = [greedy(f"text{i}", ids, n_max=4 + 15 * i) for i, ids in enumerate(text)]
    made.append(greedy("tail", [*text[2], 7, 8], n_max=40))
    budgets = [
        VisualBudget(),
        VisualBudget(tokens=5, method="uniform"),
        VisualBudget(ratio=0.5, method="divprune"),
        VisualBudget(tokens=9, method="random"),
        VisualBudget(tokens=4, method="pool"),
    ]
    for i, visual in enumerate(budgets):
        ids = [1, 2, 3, IMAGE_ID, 4, 5]
        made.append(greedy(f"one{i}", ids, [picture(1, 4, 5)], n_max=6, visual=visual))
        ids = [1, 2, IMAGE_ID, *text[0], IMAGE_ID, 9]
        made.append(greedy(f"two{i}", ids, [picture(2 + i % 2, 3, 4), picture(1, 4, 5)], n_max=7, visual=visual))
    return made


def test_greedy_output_does_not_depend_on_the_batch(make_engine: MakeEngine, run: Run, picture: MakePicture) -> None:
    """200 interleavings: chunk sizes, a pool that forces preemption, prefix hits, aborts, mixed budgets."""
    made = requests(picture)
    alone: dict[str, list[int]] = {}
    for generate in made:
        engine = make_engine(cache={"prefix_sharing": False})
        engine.add(generate)
        alone[generate.id] = answers(run(engine))[generate.id, 0]
    assert len({tuple(tokens) for tokens in alone.values()}) > 10, "the requests are really unlike"

    rng = random.Random(1)
    engines = [
        make_engine(),
        make_engine(cache={"memory_mb": 1}, chunk_tokens=7, step_tokens=20, max_running=4),
        make_engine(cache={"memory_mb": 1}, chunk_tokens=64, encode_patches=12),
        make_engine(cache={"prefix_sharing": False, "memory_mb": 1}, chunk_tokens=16),
    ]
    for i in range(200):
        engine = engines[i % len(engines)]
        batch = rng.sample(made, 5)
        left, aborted, events = list(batch), set[str](), list[Event]()
        while left or engine.has_work:
            while left and rng.random() < 0.5:
                engine.add(left.pop())
            if rng.random() < 0.02:
                aborted.add(batch[0].id)
                engine.abort(batch[0].id)
            events += engine.step()
        for (id, _), tokens in answers(events).items():
            expected = alone[id]
            assert tokens == (expected[: len(tokens)] if id in aborted else expected), f"interleaving {i}, {id}"
        engine.check()
    beats = [engine.heartbeat() for engine in engines]
    assert all(beat.preemptions > 0 for beat in beats[2:]) and all(beat.cached_tokens > 0 for beat in beats[:3])
    assert beats[3].cached_tokens == 0


def test_a_prefix_hit_gives_the_same_tokens_and_skips_the_tower(
    make_engine: MakeEngine, run: Run, picture: MakePicture, model: Any
) -> None:
    engine = make_engine()
    ids = [1, 2, 3, IMAGE_ID, *range(10, 30)]
    first = greedy("a", ids, [picture(1)])
    engine.add(first)
    cold = run(engine)
    rows, towers = model.n_rows, len(model.encoded)
    engine.add(greedy("b", ids, [picture(1)]))
    warm = run(engine)
    assert answers(cold)["a", 0] == answers(warm)["b", 0]
    usage = ends(warm)[0].usage
    assert usage is not None and usage.cached_tokens == 36 and usage.encoder_hits == 0
    assert model.n_rows - rows == 3 + 7 and len(model.encoded) == towers, "three prompt tokens and seven of the answer"
    for other in (
        greedy("c", ids, [picture(2)]),
        greedy("d", ids, [picture(1)], salt=b"other tenant"),
        greedy("e", ids, [picture(1)], visual=VisualBudget(tokens=15, method="uniform")),
    ):
        engine.add(other)
        usage = ends(run(engine))[0].usage
        assert usage is not None and usage.cached_tokens == 0, f"{other.id} shares nothing"


def test_the_answer_opens_the_next_turn(make_engine: MakeEngine, run: Run) -> None:
    engine = make_engine()
    engine.add(greedy("a", list(range(14)), n_max=11))
    tokens = answers(run(engine))["a", 0]
    engine.add(greedy("b", [*range(14), *tokens, 1, 2, 3]))
    usage = ends(run(engine))[0].usage
    assert usage is not None and usage.cached_tokens == 24


def test_one_picture_is_encoded_once_whatever_the_budgets(
    make_engine: MakeEngine, run: Run, picture: MakePicture, model: Any
) -> None:
    engine = make_engine(cache={"prefix_sharing": False})
    for i, tokens in enumerate((None, 3, 8)):
        visual = VisualBudget(tokens=tokens, method="uniform")
        engine.add(greedy(f"r{i}", [i, IMAGE_ID, 5], [picture(4)], visual=visual))
    events = run(engine)
    assert sum(model.encoded) == 1
    assert sorted(e.usage.encoder_hits for e in ends(events) if e.usage) == [0, 1, 1]
    engine.add(greedy("later", [IMAGE_ID, IMAGE_ID], [picture(4), picture(4)]))
    [end] = ends(run(engine))
    assert sum(model.encoded) == 1 and end.usage is not None and end.usage.encoder_hits == 2
    beat = engine.heartbeat()
    assert (beat.images_encoded, beat.encoder_hits) == (1, 4)


def test_a_picture_that_was_read_whole_is_not_encoded_again_for_a_budget(
    make_engine: MakeEngine, run: Run, picture: MakePicture, model: Any
) -> None:
    """Whole, it needs no signals, but what its method would read is recorded with it."""
    engine = make_engine(cache={"prefix_sharing": False})
    for i, tokens in enumerate((None, 5, None)):
        visual = VisualBudget(tokens=tokens, method="foveal")
        engine.add(greedy(f"r{i}", [i, IMAGE_ID, 5], [picture(4)], visual=visual))
        run(engine)
    engine.add(greedy("other", [3, IMAGE_ID, 5], [picture(4)], visual=VisualBudget(tokens=None, method="hiprune")))
    run(engine)
    assert model.encoded == [1]


def test_the_budget_shortens_the_prompt_and_is_accounted_for(
    make_engine: MakeEngine, run: Run, picture: MakePicture
) -> None:
    engine = make_engine()
    visual = VisualBudget(tokens=12, method="divprune")
    engine.add(greedy("a", [1, IMAGE_ID, 2, IMAGE_ID, 3], [picture(1, 4, 4), picture(2, 4, 8)], visual=visual))
    events = run(engine)
    accepted = events[0]
    assert isinstance(accepted, Accepted) and accepted.prompt_tokens == 3 + 12
    assert (accepted.visual.offered, accepted.visual.kept, accepted.visual.method) == (48, 12, "divprune")
    assert [(u.offered, u.kept, u.rows, u.cols) for u in accepted.visual.per_image] == [(16, 4, 4, 4), (32, 8, 4, 8)]
    usage = ends(events)[0].usage
    assert usage is not None and usage.peak_kv_tokens == 15 + 7 and usage.output_tokens == 8


def test_a_budget_that_keeps_all_is_the_unpruned_run(make_engine: MakeEngine, run: Run, picture: MakePicture) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=6, logprobs=3)
    seen = []
    for method in ("none", "divprune", "pool", "random"):
        engine = make_engine()
        visual = VisualBudget(tokens=None if method == "none" else 16, method=method)
        engine.add(greedy("a", [1, IMAGE_ID, 2], [picture(1)], visual=visual, sampling=sampling))
        events = run(engine)
        assert isinstance(events[0], Accepted) and events[0].visual.method == "none"
        seen.append([event.logprobs for event in events if isinstance(event, Delta)])
    assert all(other == seen[0] for other in seen), "bit for bit"


def test_an_overlong_prompt_is_compressed_to_fit(make_engine: MakeEngine, run: Run, picture: MakePicture) -> None:
    engine = make_engine(cache={"memory_mb": 2})
    engine.add(greedy("a", [IMAGE_ID, *range(100)], [picture(1, 16, 20)], n_max=9))
    events = run(engine)
    assert isinstance(events[0], Accepted) and events[0].prompt_tokens == 247
    assert ends(events)[0].finish == "length" and len(answers(events)["a", 0]) == 9, "the answer asked for fits"


@pytest.mark.parametrize("when", range(6))
def test_abort_frees_everything(make_engine: MakeEngine, picture: MakePicture, when: int) -> None:
    engine = make_engine(chunk_tokens=8, encode_patches=16)
    engine.add(greedy("a", [1, IMAGE_ID, *range(20), IMAGE_ID], [picture(1), picture(2)], n_max=50, n=2))
    events: list[Event] = []
    for _ in range(when):
        events += engine.step()
    engine.abort("a")
    engine.abort("a")
    engine.abort("unknown")
    events += engine.step()
    assert [(e.choice, e.finish) for e in ends(events)] == [(0, "abort"), (1, "abort")]
    engine.check()
    assert not engine.has_work and engine.heartbeat().used_blocks == 0
    assert engine.step() == []


def test_choices_share_the_prompt_and_differ_as_their_noise(make_engine: MakeEngine, run: Run, model: Any) -> None:
    sampling = SamplingParams(temperature=1.0, max_tokens=6, seed=3, top_p=0.95)
    ids = list(range(41))
    shared, apart = make_engine(), make_engine(cache={"prefix_sharing": False, "memory_mb": 2}, max_running=2)
    shared.add(greedy("a", ids, sampling=sampling, n=5))
    tokens = answers(run(shared))
    assert model.n_rows == 41 + 4 * 1 + 5 * 5, "the prompt once, its last token four times more, and the answers"
    apart.add(greedy("a", ids, sampling=sampling, n=5))
    assert answers(run(apart)) == tokens
    assert len({tuple(t) for t in tokens.values()}) == 5


def test_stop_tokens_and_limits(make_engine: MakeEngine, run: Run) -> None:
    engine = make_engine()
    engine.add(greedy("free", [5, 6, 7], n_max=30))
    free = answers(run(engine))["free", 0]
    stop = next(token for token in free if token != free[0])
    at = free.index(stop)

    def end(**sampling: Any) -> Delta:
        engine.add(greedy("r", [5, 6, 7], sampling=SamplingParams(temperature=0.0, **sampling)))
        events = run(engine)
        [last] = ends(events)
        assert answers(events)["r", 0] == free[: at + 1] or "min_tokens" in sampling
        return last

    last = end(max_tokens=30, stop_token_ids=(stop,))
    assert (last.finish, last.stop_token, last.token_ids) == ("stop", stop, [stop])
    last = end(max_tokens=at + 1)
    assert (last.finish, last.stop_token) == ("length", None)
    last = end(max_tokens=30, stop_token_ids=(stop,), min_tokens=at + 2)
    assert last.usage is not None and last.usage.output_tokens >= at + 2
    eos = SamplingParams(temperature=0.0, logit_bias={257: 1000.0}, max_tokens=3)
    engine.add(greedy("eos", [1], sampling=eos))
    assert ends(run(engine))[0].stop_token == 257
    engine.add(greedy("on", [1], sampling=SamplingParams(**{**_fields(eos), "ignore_eos": True})))
    assert ends(run(engine))[0].finish == "length"


def _fields(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in params.__struct_fields__}


def test_without_max_tokens_the_answer_fills_the_context(make_engine: MakeEngine, run: Run) -> None:
    engine = make_engine(cache={"memory_mb": 2})
    engine.add(greedy("a", list(range(240)), sampling=SamplingParams(temperature=0.0, ignore_eos=True)))
    assert len(answers(run(engine))["a", 0]) == 16


def test_an_image_may_state_its_own_count_or_share(make_engine: MakeEngine, run: Run, picture: MakePicture) -> None:
    engine = make_engine()
    pictures = [
        msgspec.structs.replace(picture(1, 4, 5), ratio=0.25),
        msgspec.structs.replace(picture(2, 4, 5), ratio=0.5, tokens=7),
        msgspec.structs.replace(picture(3, 1, 1), ratio=0.1),
        picture(4, 4, 5),
    ]
    visual = VisualBudget(method="uniform")
    engine.add(greedy("a", [IMAGE_ID] * 4 + [1], pictures, visual=visual))
    accepted = next(event for event in run(engine) if isinstance(event, Accepted))
    assert [image.kept for image in accepted.visual.per_image] == [5, 7, 1, 20]


def test_signals_not_yet_tapped_count_against_the_encode_budget(
    make_engine: MakeEngine, run: Run, picture: MakePicture, model: Any
) -> None:
    """A picture that is cached for one method and lacks a signal for another is not free because both are asked for."""
    engine = make_engine(cache={"prefix_sharing": False}, encode_patches=16)
    for i in range(4):
        engine.add(greedy(f"warm{i}", [IMAGE_ID, 1], [picture(i)], visual=VisualBudget(tokens=9, method="divprune")))
    run(engine)
    assert model.encoded == [1] * 4
    for i in range(4):
        for method in ("divprune", "visionzip"):
            visual = VisualBudget(tokens=8, method=method)
            engine.add(greedy(f"{method}{i}", [IMAGE_ID, 1], [picture(i)], visual=visual))
    run(engine)
    assert model.encoded == [1] * 8
