"""P-Sigmoid: the curve, its budget, and the limit on points."""

import math

import pytest

from foveate.configs.errors import ConfigError
from foveate.engine.prune.methods.psigmoid import PSigmoid
from foveate.engine.prune.schedule import kept, mean_share, table_of

SETTINGS = [(10.0, 0.4, 0.5), (10.0, 0.4, 0.22), (30.0, 0.7, 0.6), (0.0, 0.5, 0.3), (100.0, 0.0, 0.11), (5.0, 1.0, 0.9)]


@pytest.mark.parametrize("seed", range(20))
def test_it_ranks_by_the_last_token_in_the_layer_before(prompts, seed: int) -> None:
    case = prompts.draw(seed, left=0.8)
    counts, row = prompts.counts(case, seed), case.seen("before")[:, -1].mean(0)
    assert prompts.leave("psigmoid", case, counts).keep.tolist() == prompts.best(case, row.tolist(), counts)


@pytest.mark.parametrize(("alpha", "beta", "mean"), SETTINGS)
@pytest.mark.parametrize("n_layers", [24, 32])
def test_the_table_is_the_curve_times_a_factor_up_to_1(alpha: float, beta: float, mean: float, n_layers: int) -> None:
    table = PSigmoid(alpha=alpha, beta=beta, mean=mean).table(n_layers)
    curve = [1 / (1 + math.exp(alpha * (layer / n_layers - beta))) for layer in range(n_layers)]
    assert sum(table) / n_layers == pytest.approx(mean, abs=1e-6)
    assert all(a >= b for a, b in zip(table, table[1:], strict=False)), "never growing"
    factors = {round(share / of, 6) for share, of in zip(table[1:], curve[1:], strict=True) if share < 1}
    assert len(factors) == 1
    assert all(of * min(factors) >= 1 - 1e-6 for share, of in zip(table[1:], curve[1:], strict=True) if share == 1)


@pytest.mark.parametrize(("alpha", "beta", "mean"), SETTINGS)
@pytest.mark.parametrize("n_layers", [24, 32])
def test_few_points_hold_the_budget_within_a_token(alpha: float, beta: float, mean: float, n_layers: int) -> None:
    points = PSigmoid(alpha=alpha, beta=beta, mean=mean).points(n_layers)
    assert 1 <= len(points) <= 4
    assert mean_share(points, n_layers) == pytest.approx(mean, abs=1e-6)
    held = sum(kept(576, share) for share in table_of(points, n_layers)) / n_layers
    assert abs(held - mean * 576) <= 1


def test_a_mean_of_all_is_no_point_and_one_below_the_first_layer_is_refused() -> None:
    assert PSigmoid(mean=1.0).points(24) == ()
    with pytest.raises(ConfigError, match="mean: 0.2 is below what the first of 4 layers"):
        PSigmoid(mean=0.2).points(4)
    for name, value in (("alpha", -1.0), ("beta", 1.5), ("mean", 0.0), ("max_points", 0)):
        with pytest.raises(ConfigError, match=f"{name}: "):
            PSigmoid(**{name: value})
