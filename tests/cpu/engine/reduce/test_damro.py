"""DAMRO's filter against its rule in a few lines."""

import pytest

from foveate.engine.common import Grid
from foveate.engine.reduce.methods.damro import Damro


def plain(attention: list[float], k: int, n_outliers: int) -> list[int]:
    order = sorted(range(len(attention)), key=lambda i: (-attention[i], i))
    outliers, rest = order[:n_outliers], order[n_outliers:]
    return sorted([*rest, *reversed(outliers)][:k]) if len(rest) < k else sorted(rest[:k])


@pytest.mark.parametrize("encoder", ["cls", "no_cls", "merging"])
@pytest.mark.parametrize("seed", range(20))
def test_outliers_go_and_the_next_stay(pictures, seed: int, encoder: str) -> None:
    for share in (10 / 576, 0.2, 0.9):
        inputs, k = pictures.draw("damro", seed, encoder)
        attention = (inputs.cls_cat() if encoder == "cls" else inputs.recv()).tolist()
        assert pictures.kept("damro", inputs, k, outliers=share) == plain(attention, k, round(inputs.n * share))


def test_the_papers_counts() -> None:
    assert round(576 * Damro().outliers) == 10
    assert round(257 * Damro().outliers) == 4


def test_it_reads_all_heads_in_one_softmax_where_there_is_a_cls_row(pictures) -> None:
    towers = pictures.towers
    assert {str(s) for s in Damro().wanted(towers["cls"])} == {"cls_cat(22)"}
    assert {str(s) for s in Damro().wanted(towers["merging"])} == {"recv(31)"}


def test_no_outliers_is_attention_alone_and_almost_all_tokens_bring_them_back(pictures) -> None:
    inputs = pictures.make(Damro(), Grid(24, 24), "cls", seed=1)
    order = inputs.cls_cat().argsort(descending=True).tolist()
    assert pictures.kept("damro", inputs, 64, outliers=0.0) == sorted(order[:64])
    assert pictures.kept("damro", inputs, 64) == sorted(order[10:74])
    assert pictures.kept("damro", inputs, 570) == sorted(order[6:])
