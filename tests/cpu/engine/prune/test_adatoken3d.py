"""AdaToken-3D: PyramidDrop on the released table."""

import pytest

from foveate.configs.errors import ConfigError
from foveate.engine.prune.methods.adatoken3d import AdaToken3D
from foveate.engine.prune.methods.pyramiddrop import PyramidDrop
from foveate.engine.prune.schedule import mean_share

LAYERS, SHARES = "4,8,12,16,18,20,22,24,26,28", "0.9,0.8,0.75,0.7,0.6,0.55,0.5,0.45,0.4,0.25"


def test_with_the_same_table_it_is_pyramiddrop() -> None:
    assert AdaToken3D(max_points=10).points(32) == PyramidDrop(layers=LAYERS, shares=SHARES).points(32)


@pytest.mark.parametrize("seed", range(20))
def test_it_ranks_as_pyramiddrop(prompts, seed: int) -> None:
    case = prompts.draw(seed, left=0.8)
    counts, row = prompts.counts(case, seed), case.seen("this")[:, -1].mean(0)
    assert prompts.leave("adatoken3d", case, counts).keep.tolist() == prompts.best(case, row.tolist(), counts)


@pytest.mark.parametrize("n_layers", [12, 24, 28, 32, 40])
def test_joined_points_hold_the_same_on_average(n_layers: int) -> None:
    few, all_of_them = AdaToken3D().points(n_layers), AdaToken3D(max_points=10).points(n_layers)
    assert len(few) <= 4 < len(all_of_them)
    assert mean_share(few, n_layers) == pytest.approx(mean_share(all_of_them, n_layers), abs=1e-6)


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match="max_points: 0"):
        AdaToken3D(max_points=0)
