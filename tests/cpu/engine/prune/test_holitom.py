"""HoliTom's inner merge: one token after the other, as in the paper, against the closed form."""

import pytest
import torch
from torch import Tensor

from foveate.configs.errors import ConfigError
from foveate.engine.common import Grid
from foveate.engine.prune.methods.holitom import HoliTom
from foveate.engine.prune.schedule import Point


def merged(case, keep: list[int], merge: str) -> Tensor:
    """The states of the kept tokens after all others merged into them, in reading order."""
    states = case.probe.rows[case.probe.visual]
    picture = case.probe.picture.tolist()
    out, members = {j: states[j].clone() for j in keep}, {j: [states[j]] for j in keep}
    for i in range(len(states)):
        mine = [j for j in keep if picture[j] == picture[i]]
        if i in keep or not mine:
            continue
        target = max(mine, key=lambda j: (torch.cosine_similarity(states[i], states[j], 0).item(), -j))
        out[target] = (out[target] + states[i]) / 2
        members[target].append(states[i])
    return torch.stack([out[j] if merge == "sequential" else torch.stack(members[j]).mean(0) for j in keep])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("merge", ["sequential", "mean"])
def test_the_closed_form_is_the_loop(prompts, seed: int, merge: str) -> None:
    case = prompts.draw(seed, left=0.8)
    counts = prompts.counts(case, seed)
    leaves = prompts.leave("holitom", case, counts, merge=merge)
    assert leaves.keep.tolist() == prompts.leave("fastv", case, counts).keep.tolist()
    if len(leaves.keep):
        expected = merged(case, leaves.keep.tolist(), merge)
        torch.testing.assert_close(leaves.mix @ case.probe.rows[case.probe.visual], expected)


def test_many_into_one_stay_finite_and_later_ones_weigh_more(prompts) -> None:
    case = prompts.make(3, 2, [Grid(20, 20)])
    mix = prompts.leave("holitom", case, [1]).mix
    assert torch.isfinite(mix).all() and float(mix.sum()) == pytest.approx(1)
    weights = mix[0, torch.arange(400) != int(prompts.leave("fastv", case, [1]).keep)]
    assert (weights.diff() >= 0).all() and float(weights[-1]) == 0.5


def test_where_and_what_it_refuses() -> None:
    assert HoliTom(k=3).points(28) == (Point(3, 0.5),) and HoliTom(k=1).points(4) == (Point(1, 0.5),)
    assert HoliTom(r=0.0).points(28) == ()
    for fields, message in (({"k": -1}, "k: -1"), ({"r": 1.5}, "r: 1.5")):
        with pytest.raises(ConfigError, match=message):
            HoliTom(**fields)


@pytest.mark.parametrize(("n_layers", "layer"), [(2, 1), (4, 3), (24, 15), (28, 18), (32, 21), (40, 26)])
def test_the_default_layer_is_18_of_28_at_any_depth(n_layers: int, layer: int) -> None:
    assert HoliTom().points(n_layers) == (Point(layer, 0.5),)
