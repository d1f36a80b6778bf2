"""MustDrop's second stage: the two thresholds, and the count."""

import pytest

from foveate.configs.errors import ConfigError
from foveate.engine.prune.methods.mustdrop2 import MustDrop2
from foveate.engine.prune.schedule import Point, mean_share


def passing(seen: list[list[float]], theta_sum: float, theta_max: float) -> list[bool]:
    """Whether the paper's rule keeps each token; `seen` is [words][tokens]."""
    total = sum(map(sum, seen))
    columns = list(zip(*seen, strict=True))
    return [not (sum(column) < theta_sum * total and max(column) < theta_max) for column in columns]


@pytest.mark.parametrize("seed", range(20))
def test_the_count_that_the_thresholds_give_is_their_set(prompts, seed: int) -> None:
    case = prompts.draw(seed, left=0.8)
    last = int(case.probe.visual[-1])
    seen = case.seen("before").mean(0)[last + 1 :].tolist()
    for theta_sum, theta_max in ((0.02, 0.03), (0.05, 0.02), (0.1, 0.1)):
        stays = passing(seen, theta_sum, theta_max)
        counts = [sum(stays[i] for i in case.mine(p)) for p in range(len(case.present))]
        found = prompts.leave("mustdrop2", case, counts, theta_sum=theta_sum, theta_max=theta_max).keep.tolist()
        assert found == [i for i, stay in enumerate(stays) if stay]


@pytest.mark.parametrize("seed", range(20))
def test_others_are_ranked_by_their_margin(prompts, seed: int) -> None:
    case = prompts.draw(seed, left=0.8)
    seen = case.seen("before").mean(0)[int(case.probe.visual[-1]) + 1 :].tolist()
    total, columns = sum(map(sum, seen)), list(zip(*seen, strict=True))
    margin = [max(sum(column) / total / 0.05, max(column) / 0.1) for column in columns]
    counts = prompts.counts(case, seed)
    found = prompts.leave("mustdrop2", case, counts, theta_sum=0.05, theta_max=0.1).keep.tolist()
    assert found == prompts.best(case, margin, counts)


def test_only_the_ratio_of_the_thresholds_matters(prompts) -> None:
    case = prompts.draw(5)
    counts = prompts.counts(case, 1)
    one, other = (prompts.leave("mustdrop2", case, counts, theta_sum=2 * t, theta_max=t).keep for t in (0.01, 0.1))
    assert one.tolist() == other.tolist()


def test_the_default_is_a_third_of_the_tokens_on_average() -> None:
    points = MustDrop2().points(32)
    assert points == (Point(3, 0.6), Point(7, 0.4), Point(11, 0.2), Point(15, 0.17))
    assert mean_share(points, 32) == pytest.approx(192 / 576, abs=0.005)
    with pytest.raises(ConfigError, match="theta_max: 0.0"):
        MustDrop2(theta_max=0.0)
