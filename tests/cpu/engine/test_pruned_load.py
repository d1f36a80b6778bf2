"""Thousands of pruned requests, ended early or not: nothing is held at the end, and nobody's tokens change."""

import random

import msgspec
import pytest

from foveate.engine.common import Delta, Failed, Generate, SamplingParams, Stage, VisualBudget

PLANS = [
    VisualBudget(method="none"),
    VisualBudget(method="none", prune=Stage(method="fastv", params={"k": 1, "r": 0.6})),
    VisualBudget(method="random", ratio=0.5, prune=Stage(method="fastv", params={"k": 1, "compact": True})),
    VisualBudget(method="none", prune=Stage(method="horizon")),
    VisualBudget(method="none", prune=Stage(method="holitom", params={"k": 1})),
    VisualBudget(method="none", prune=Stage(method="todre2")),
    VisualBudget(method="none", prune=Stage(method="visiondrop2")),
]


def requests(picture, n: int, seed: int, longest: int = 4):
    rng = random.Random(seed)
    for i in range(n):
        images = [picture(rng.randrange(6), 2, rng.choice((2, 3))) for _ in range(rng.choice((0, 1, 1, 2)))]
        ids = [rng.randrange(2, 200) for _ in range(rng.randrange(1, 6))]
        for _ in images:
            ids += [256, rng.randrange(2, 200)]
        ids += [rng.randrange(2, 5) for _ in range(rng.randrange(1, 4))]
        yield Generate(
            id=str(i), prompt_ids=ids, images=images, visual=rng.choice(PLANS), n=rng.choice((1, 1, 1, 2)),
            sampling=SamplingParams(temperature=0.0, max_tokens=rng.randrange(1, longest + 1), ignore_eos=True),
        )  # fmt: skip


def drive(engine, generates, abort: float, seed: int = 0) -> dict[str, list[int]]:
    """Feed requests in as others end; some are aborted at a random moment."""
    rng = random.Random(seed)
    alive: dict[str, int] = {}
    tokens: dict[str, list[int]] = {}
    waiting = iter(generates)
    steps, more = 0, True
    while more or engine.has_work:
        while more and len(alive) < 12:
            generate = next(waiting, None)
            more = generate is not None
            if generate is not None:
                engine.add(generate)
                alive[generate.id] = generate.n
        if alive and rng.random() < abort:
            engine.abort(rng.choice(list(alive)))
        for event in engine.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Delta):
                tokens.setdefault(f"{event.id}/{event.choice}", []).extend(event.token_ids)
                if event.finish is not None:
                    alive[event.id] -= 1
                    if not alive[event.id]:
                        del alive[event.id]
        steps += 1
        if steps % 50 == 0:
            engine.check()
    return tokens


def test_five_thousand_requests_with_aborts_leak_nothing(make_engine, picture):
    engine = make_engine({"memory_mb": 1}, chunk_tokens=16, step_tokens=60, max_running=10)
    drive(engine, requests(picture, 5000, 1), abort=0.1)
    assert engine._space.pool.n_used == 0 and not engine._requests


@pytest.mark.parametrize("seed", [2, 3])
def test_no_request_notices_the_others(make_engine, picture, seed):
    """In crowds, chunks and preemptions each says what it says alone, with nothing shared."""
    crowd = make_engine({"memory_mb": 1}, chunk_tokens=5, step_tokens=30, max_running=8)
    together = drive(crowd, requests(picture, 40, seed, 24), abort=0.0)
    assert crowd.heartbeat().preemptions > 0, "the pool is tight"
    alone = make_engine({"prefix_sharing": False})
    for generate in requests(picture, 40, seed, 24):
        for name, tokens in drive(alone, [generate], abort=0.0).items():
            assert together[name] == tokens, name


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("seed", [4, 5])
def test_requests_whose_forward_raises_behind_a_pruning_point_fail_alone(
    make_engine, model, picture, monkeypatch, seed, sharing
):
    """The others in the batch have just chosen or set rows aside; what they did is undone, and done again."""
    culprit = 201
    generates = list(requests(picture, 40, seed, 12))
    bad = {generate.id for generate in generates[3::5]}
    spoiled = [
        msgspec.structs.replace(g, prompt_ids=[*g.prompt_ids, culprit], visual=PLANS[1]) if g.id in bad else g
        for g in generates
    ]
    embed, logits, run = model.embed, model.logits, model.run
    present, retried = [False], []

    def embed_and_look(token_ids):
        present[0] = culprit in token_ids.tolist()
        return embed(token_ids)

    def logits_or_raise(rows):
        if present[0]:
            raise RuntimeError("the head broke")
        return logits(rows)

    def run_or_raise(rows, rotary, attention, layers, *rest):
        if present[0] and layers.start > 0:
            retried.append(True)
            raise RuntimeError("a deep layer broke")
        return run(rows, rotary, attention, layers, *rest)

    alone = make_engine({"prefix_sharing": False})
    expected = {}
    for generate in generates:
        if generate.id not in bad:
            expected |= drive(alone, [generate], abort=0.0)
    monkeypatch.setattr(model, "embed", embed_and_look)
    monkeypatch.setattr(model, "logits", logits_or_raise)
    monkeypatch.setattr(model, "run", run_or_raise)
    crowd = make_engine({"memory_mb": 2, "prefix_sharing": sharing}, chunk_tokens=5, step_tokens=40, max_running=8)
    forward = crowd._runner.run

    def decisions(chunks):
        return [chunk.sequence.request.depth.decision for chunk in chunks]

    def forward_and_look(chunks):
        before = decisions(chunks)
        try:
            return forward(chunks)
        except RuntimeError:
            undone.append(decisions(chunks) == before)
            raise

    undone: list[bool] = []
    monkeypatch.setattr(crowd._runner, "run", forward_and_look)
    failed: set[str] = set()
    tokens: dict[str, list[int]] = {}
    for generate in spoiled:
        crowd.add(generate)
    while crowd.has_work:
        for event in crowd.step():
            if isinstance(event, Failed):
                failed.add(event.id)
            elif isinstance(event, Delta) and event.id not in bad:
                tokens.setdefault(f"{event.id}/{event.choice}", []).extend(event.token_ids)
        crowd.check()
    assert failed == bad and len(retried) > len(bad) and tokens == expected and all(undone)
    assert crowd._space.pool.n_used == 0 and not crowd._requests
