"""DUET-VLM's stage at the encoder, written out plainly, and the properties of the method."""

import pytest
import torch
from torch import Tensor

from foveate.engine.common import Grid
from foveate.engine.methods import build_reducer
from foveate.engine.reduce.methods.duet import Duet
from foveate.engine.vision import VisualInputs


def plain(inputs: VisualInputs, k: int, ratio: float, width: int, compat: bool) -> dict[int, tuple[set[int], Tensor]]:
    """The sources and the values of each output row, by the token whose place the row takes."""
    scores, unit = inputs.saliency().tolist(), torch.nn.functional.normalize(inputs.keys().double(), dim=-1)
    cosine = (unit @ unit.T).tolist()
    rows = (inputs.proj if inputs.enc is None else inputs.enc).double()
    n, c = len(scores), min(round(k * ratio), k - 1)
    best = sorted(range(n), key=lambda i: (-scores[i], i))
    dominant, rest = best[: k - c], best[k - c :]
    looked_at = rest[: min(width * c, len(rest))]
    step = max(1, len(looked_at) // c) if c else 1
    anchors = looked_at[::step][:c]
    members: dict[int, list[int]] = {anchor: [] for anchor in anchors}
    for i in looked_at:
        if i not in anchors:
            members[max(anchors, key=lambda t, i=i: (cosine[i][t], -t))].append(i)
    out = {i: ({i}, rows[i]) for i in dominant}
    for anchor, found in members.items():
        mean = rows[[anchor, *found]].mean(0)
        released = rows[anchor] + (rows[found].mean(0) if found else 0)
        out[anchor] = ({anchor, *found}, released if compat else mean)
    return out


@pytest.mark.parametrize("encoder", ["cls", "merging"])
@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_paper_step_by_step(pictures, seed: int, compat: bool, encoder: str) -> None:
    for ratio, width in ((35 / 205, 4), (0.5, 3), (0.3, 1)):
        params = {"contextual_ratio": ratio, "cluster_width": width, "compat": compat}
        inputs, k = pictures.draw("duet", seed, encoder, **params)
        groups, rows = pictures.as_merged(inputs, plain(inputs, k, ratio, width, compat))
        found, found_rows = pictures.merged("duet", inputs, k, **params)
        assert found == groups
        torch.testing.assert_close(found_rows, rows, rtol=1e-4, atol=1e-5)


def test_what_is_little_attended_to_is_dropped(pictures) -> None:
    inputs = pictures.make(Duet(), Grid(24, 24), "cls", seed=1)
    transform = Duet().reduce(inputs, 205)
    best = torch.sort(inputs.saliency(), descending=True, stable=True).indices
    dropped = (transform.back == -1).nonzero()[:, 0]
    assert sorted(dropped.tolist()) == sorted(best[170 + 4 * 35 :].tolist())
    assert int(transform.size.sum()) == 170 + 4 * 35
    assert set(best[:170].tolist()) < set(transform.anchor.tolist())


def test_wide_clusters_lose_nothing_and_keep_visionzips_dominant_tokens(pictures) -> None:
    inputs = pictures.make(Duet(), Grid(10, 10), "cls", seed=2)
    wide = build_reducer("duet", {"cluster_width": 1000, "contextual_ratio": 0.25}).reduce(inputs, 40)
    zipped = build_reducer("visionzip", {"contextual_ratio": 0.25}).reduce(inputs, 40)
    dominant = set(pictures.kept("fastervlm", inputs, 30))
    assert dominant == set(wide.anchor.tolist()) & dominant == set(zipped.anchor.tolist()) & dominant
    for transform in (wide, zipped):
        assert sorted(transform.indices.tolist()) == list(range(100)) and (transform.back >= 0).all()
