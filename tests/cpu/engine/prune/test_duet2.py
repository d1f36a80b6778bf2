"""DUET-VLM's second stage against the rows of attention built in full."""

import pytest

from foveate.engine.prune.methods.duet2 import Duet2
from foveate.engine.prune.schedule import Point


@pytest.mark.parametrize("seed", range(20))
def test_it_keeps_what_the_words_attend_to_in_the_layer_to_come(prompts, seed: int) -> None:
    case = prompts.draw(seed, left=0.7)
    counts, last = prompts.counts(case, seed), int(case.probe.visual[-1])
    rows = range(last + 1, case.probe.n)
    seen = case.seen("this").mean(0)
    scores = [sum(seen[t, v].item() for t in rows) / len(rows) for v in range(seen.shape[1])]
    assert prompts.leave("duet2", case, counts).keep.tolist() == prompts.best(case, scores, counts)


@pytest.mark.parametrize("seed", range(20))
def test_with_the_last_token_alone_it_is_pyramiddrop(prompts, seed: int) -> None:
    case = prompts.draw(seed, question=4)
    counts = prompts.counts(case, seed)
    found = prompts.leave("duet2", case, counts, rows="last").keep.tolist()
    assert found == prompts.leave("pyramiddrop", case, counts).keep.tolist()


def test_words_differ_from_the_last_one(prompts) -> None:
    cases = [prompts.draw(seed, question=5) for seed in range(20)]
    kept = [[prompts.leave("duet2", c, prompts.counts(c, 1), rows=r).keep.tolist() for r in ("question", "last")]
            for c in cases]  # fmt: skip
    assert any(a != b for a, b in kept)


def test_the_released_schedule() -> None:
    assert Duet2().points(28) == (Point(14, 0.5), Point(21, 0.25))
