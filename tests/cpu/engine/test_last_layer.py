"""The last layer computes only what is sampled from; the rest of a prompt leaves keys and values there, no more."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from foveate.engine.attention import AttentionBackend, CpuBackend
from foveate.engine.common import Delta, Failed, Generate, SamplingParams
from foveate.engine.engine import Engine, Event
from foveate.engine.models.base import Model

MakeEngine = Callable[..., Engine]
Run = Callable[[Engine], list[Event]]


@pytest.fixture
def wanted(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows in and rows asked for, of every run that asks for some."""
    seen: list[tuple[int, int]] = []
    run = model.run

    def recorded(
        rows: Tensor, rotary: object, attention: object, layers: range, wanted: Tensor | None = None
    ) -> Tensor:
        if wanted is not None:
            assert layers == range(1, 2), "only the last layer is asked for some"
            seen.append((len(rows), len(wanted)))
        return run(rows, rotary, attention, layers, wanted)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "run", recorded)
    return seen


def answers(engine: Engine, run: Run) -> dict[str, tuple[list[int], Tensor]]:
    """Tokens and their log-probabilities: two prompts, one of which is cut in two, and one already decoding."""
    random = torch.Generator().manual_seed(3)
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=3)

    def ask(name: str, n: int) -> Generate:
        ids = torch.randint(0, 256, (n,), generator=random).tolist()
        return Generate(id=name, prompt_ids=ids, images=[], sampling=sampling)

    engine.add(ask("early", 9))
    events = list(engine.step())
    engine.add(ask("long", 190))
    engine.add(ask("short", 80))
    tokens: dict[str, list[int]] = {}
    logprobs: dict[str, list[float]] = {}
    for event in [*events, *run(engine)]:
        assert not isinstance(event, Failed), event
        if isinstance(event, Delta):
            tokens.setdefault(event.id, []).extend(event.token_ids)
            logprobs.setdefault(event.id, []).extend(p for entry in event.logprobs or [] for _, p, *_ in entry.top)
    return {name: (ids, torch.tensor(logprobs[name])) for name, ids in tokens.items()}


def test_answers_are_those_of_whole_layers(
    make_engine: MakeEngine, run: Run, wanted: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = answers(make_engine(chunk_tokens=100), run)
    assert wanted == [(181, 2), (92, 3)], "while the long prompt goes on, only the others sample"
    wanted.clear()
    monkeypatch.setattr(AttentionBackend, "joins_layers", lambda self, n_rows: True)
    monkeypatch.setattr(CpuBackend, "joins_layers", lambda self, n_rows: True)
    whole = answers(make_engine(chunk_tokens=100), run)
    assert not wanted
    for name, (ids, logprobs) in whole.items():
        assert few[name][0] == ids
        torch.testing.assert_close(few[name][1], logprobs, atol=1e-5, rtol=0)


def test_a_chunk_that_samples_nothing_still_leaves_keys_and_values(
    make_engine: MakeEngine, run: Run, wanted: list[tuple[int, int]]
) -> None:
    engine = make_engine(chunk_tokens=100)
    ids = list(range(180))
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    engine.add(Generate(id="cut", prompt_ids=ids, images=[], sampling=sampling))
    cut = [t for event in run(engine) if isinstance(event, Delta) for t in event.token_ids]
    assert wanted == [(100, 0), (80, 1)]
    other = make_engine(chunk_tokens=200)
    other.add(Generate(id="whole", prompt_ids=ids, images=[], sampling=sampling))
    assert cut == [t for event in run(other) if isinstance(event, Delta) for t in event.token_ids]
