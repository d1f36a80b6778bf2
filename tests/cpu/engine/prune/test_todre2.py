"""ToDRE's second stage: from a layer on, no visual token is left."""

import pytest

from foveate.configs.errors import ConfigError
from foveate.engine.common import Grid
from foveate.engine.prune.methods.todre2 import ToDRE2
from foveate.engine.prune.schedule import Point


@pytest.mark.parametrize(
    ("at", "n_layers", "layer"), [(0.6, 32, 19), (0.6, 4, 2), (0.6, 2, 1), (0.99, 24, 23), (0.01, 24, 1)]
)
def test_all_leave_at_one_layer(at: float, n_layers: int, layer: int) -> None:
    assert ToDRE2(at=at).points(n_layers) == (Point(layer, 0.0),)


def test_nothing_is_left(prompts) -> None:
    case = prompts.make(1, 2, [Grid(3, 3), Grid(2, 2)])
    leaves = prompts.leave("todre2", case, [0, 0])
    assert leaves.keep.tolist() == [] and leaves.mix is None


def test_what_it_refuses() -> None:
    for at in (0.0, 1.0):
        with pytest.raises(ConfigError, match=f"at: {at}"):
            ToDRE2(at=at)
