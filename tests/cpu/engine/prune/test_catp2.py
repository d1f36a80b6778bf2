"""CATP's second stage: the question is about the last picture; the pictures before are examples."""

import pytest

from foveate.configs.errors import ConfigError
from foveate.engine.common import Grid
from foveate.engine.prune.methods.catp2 import CATP2
from foveate.engine.prune.schedule import Point, kept


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("alpha", [0.5, 1.0, 0.1])
def test_examples_and_the_picture_asked_about(prompts, seed: int, alpha: float) -> None:
    case = prompts.draw(seed, left=0.8)
    probe, seen = case.probe, case.seen("before").mean(0).tolist()
    words = range(int(probe.visual[-1]) + 1, probe.n)
    own = [int(probe.visual[i]) for i in case.mine(len(case.present) - 1)]
    scores = []
    for v, picture in enumerate(probe.picture.tolist()):
        if picture == len(case.present) - 1:
            scores.append(seen[-1][v])
        else:
            by_words, by_own = (sum(seen[t][v] for t in rows) / len(rows) for rows in (words, own))
            scores.append(alpha * by_words + (1 - alpha) * by_own)
    counts = prompts.counts(case, seed)
    assert prompts.leave("catp2", case, counts, alpha=alpha).keep.tolist() == prompts.best(case, scores, counts)


def test_with_one_picture_it_is_fastv_in_stages(prompts) -> None:
    case = prompts.make(4, 2, [Grid(5, 4)])
    for count in range(1, 20):
        assert (
            prompts.leave("catp2", case, [count]).keep.tolist() == prompts.leave("fastv", case, [count]).keep.tolist()
        )


def test_no_picture_is_lost() -> None:
    points = CATP2().points(32)
    assert points == (Point(2, 0.5), Point(4, 0.222))
    assert all(kept(n, point.share) >= 1 for point in points for n in range(1, 50))
    with pytest.raises(ConfigError, match="alpha: 1.5"):
        CATP2(alpha=1.5)
