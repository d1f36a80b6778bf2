"""VisionDrop's stage at the encoder, written out plainly, and the properties of the method."""

import pytest
import torch
from torch import Tensor

from foveate.engine.common import ENC, Grid, keys, recv, saliency
from foveate.engine.methods import build_reducer
from foveate.engine.reduce.methods.visiondrop import VisionDrop
from foveate.engine.vision import VisualInputs


def plain(inputs: VisualInputs, k: int, ratio: float, compat: bool) -> dict[int, tuple[set[int], Tensor]]:
    """The sources and the values of each output row, by the token whose place the row takes."""
    scores = (inputs.saliency() if compat else inputs.recv()).tolist()
    unit = torch.nn.functional.normalize(inputs.keys().double(), dim=-1)
    cosine = (unit @ unit.T).tolist()
    rows = (inputs.proj if inputs.enc is None else inputs.enc).double()
    n, n_contextual = len(scores), min(round(k * ratio), k - 1)
    dominant = sorted(range(n), key=lambda i: (-scores[i], i))[: k - n_contextual]
    left = [i for i in range(n) if i not in dominant]
    targets = [left[j * max(1, len(left) // n_contextual)] for j in range(n_contextual)]
    members: dict[int, list[int]] = {target: [] for target in targets}
    for i in left:
        if targets and i not in targets:
            members[max(targets, key=lambda t, i=i: (cosine[i][t], -t))].append(i)
    out = {i: ({i}, rows[i]) for i in dominant}
    for target, found in members.items():
        mean = rows[[target, *found]].mean(0)
        released = rows[target] + (rows[found].mean(0) if found else 0)
        out[target] = ({target, *found}, released if compat else mean)
    return out


@pytest.mark.parametrize("encoder", ["cls", "merging"])
@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_paper_step_by_step(pictures, seed: int, compat: bool, encoder: str) -> None:
    for ratio in (6 / 48, 0.4):
        params = {"contextual_ratio": ratio, "compat": compat}
        inputs, k = pictures.draw("visiondrop", seed, encoder, **params)
        groups, rows = pictures.as_merged(inputs, plain(inputs, k, ratio, compat))
        found, found_rows = pictures.merged("visiondrop", inputs, k, **params)
        assert found == groups
        torch.testing.assert_close(found_rows, rows, rtol=1e-4, atol=1e-5)


def test_counts_follow_the_papers_and_no_token_is_lost(pictures) -> None:
    inputs = pictures.make(VisionDrop(), Grid(24, 24), "cls", seed=1)
    transform = VisionDrop().reduce(inputs, 48)
    assert int((transform.size > 1).sum()) == 6 and int(transform.size.sum()) == 576
    assert sorted(transform.indices.tolist()) == list(range(576))
    assert VisionDrop(contextual_ratio=0.0).reduce(inputs, 48).is_selection


def test_released_it_is_visionzip_with_other_shares(pictures) -> None:
    tower = pictures.towers["cls"]
    wanted = frozenset(tower.resolve(signal) for signal in (saliency(), recv(), keys(), ENC))
    inputs = pictures.of_signals(wanted, Grid(9, 9), tower, seed=3)
    for k in (1, 20, 64):
        params = {"contextual_ratio": 0.25, "compat": True}
        one, other = (build_reducer(name, params).reduce(inputs, k) for name in ("visiondrop", "visionzip"))
        torch.testing.assert_close(one.to_matrix(), other.to_matrix())
    ranked = VisionDrop(contextual_ratio=0.0).reduce(inputs, 20).anchor.tolist()
    assert ranked == pictures.kept("fopru", inputs, 20)
