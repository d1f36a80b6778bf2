"""Every function of a probe against attention built in full."""

from dataclasses import replace

import pytest
import torch

from foveate.engine.common import Grid

SEEDS = range(12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("which", ["before", "this"])
def test_attention_is_the_rows_of_the_full_one(prompts, seed: int, which: str) -> None:
    case = prompts.draw(seed, left=0.6)
    probe, seen = case.probe, case.seen(which)
    for rows in (probe.last, probe.question, probe.text, probe.visual, torch.arange(probe.n)):
        torch.testing.assert_close(probe.attention(rows, which, per_head=True), seen[:, rows])
        torch.testing.assert_close(probe.attention(rows, which), seen[:, rows].mean(0))
        torch.testing.assert_close(probe.received(rows, which), seen[:, rows].sum((0, 1)) / (4 * max(1, len(rows))))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rotated", [True, False])
def test_over_visual_is_a_softmax_of_its_own(prompts, seed: int, rotated: bool) -> None:
    case = prompts.draw(seed, left=0.6)
    probe, m = case.probe, case.m
    for which in ("before", "this"):
        q, k, _ = prompts.decoder.project(case.layers[which], case.states[which], case.positions, rotated)
        for i in (int(probe.last), 0, probe.n // 2):
            cols = [int(v) for v in probe.visual if v <= i]
            found = probe.attention(torch.tensor([i]), which, over="visual", rotated=rotated, per_head=True)[:, 0]
            for h in range(4):
                expected = torch.zeros(len(probe.visual))
                if cols:
                    scores = torch.stack([q[m + i, h] @ k[m + v, h // 2] for v in cols]) * 8**-0.5
                    expected[: len(cols)] = scores.softmax(0)
                torch.testing.assert_close(found[h], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_propagate_sends_weights_along_attention(prompts, seed: int) -> None:
    case = prompts.draw(seed, left=0.6)
    weights = torch.rand(4, case.probe.n, generator=torch.Generator().manual_seed(seed))
    for which in ("before", "this"):
        for temperature in (1.0, 0.3, 2.0):
            a = prompts.decoder.attention(case.layers[which], case.states[which], case.positions, temperature)
            expected = torch.einsum("hr,hrc->hc", weights, a[:, case.m :, case.m :])
            found = case.probe.views(which).propagate(weights, temperature)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_pieces_change_nothing(prompts, monkeypatch, seed: int) -> None:
    case = prompts.draw(seed)
    probe, rows = case.probe, torch.arange(case.probe.n)
    weights = torch.ones(4, probe.n)
    view = probe.views("this")
    whole = probe.attention(rows, "this"), probe.received(rows, "this"), view.propagate(weights, 0.5)
    monkeypatch.setattr("foveate.engine.prune.probe._MAX_SCORES", 5 * probe.n)
    pieces = replace(view), rows
    assert len(list(view.blocks(rows, probe.n))) == probe.n, "a row at a time"
    cut = probe.attention(rows, "this"), probe.received(rows, "this"), pieces[0].propagate(weights, 0.5)
    torch.testing.assert_close(cut, whole)


@pytest.mark.parametrize("seed", SEEDS)
def test_keys_and_plain(prompts, seed: int) -> None:
    case = prompts.draw(seed, left=0.6)
    for which in ("before", "this"):
        q, k, _ = prompts.decoder.project(case.layers[which], case.states[which], case.positions)
        torch.testing.assert_close(case.probe.keys(which), k[case.m + case.probe.visual].mean(1))
        q, k, _ = prompts.decoder.project(case.layers[which], case.states[which], case.positions, rotated=False)
        plain = case.probe.views(which).plain
        torch.testing.assert_close(plain.q, q[case.m :], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(plain.k, k[case.m :], atol=1e-5, rtol=1e-4)
        assert plain.m == 0 and case.probe.views(which).m == case.m


@pytest.mark.parametrize("seed", SEEDS)
def test_a_row_sums_to_one_over_all_keys_and_columns_to_the_number_of_rows(prompts, seed: int) -> None:
    case = prompts.draw(seed)
    view, rows = case.probe.views("this"), torch.arange(case.probe.n)
    seen = (view.scores(rows, rows) - view.normaliser(rows).T[:, :, None]).exp()
    earlier = case.full("this")[:, :, : case.m].sum(-1)
    torch.testing.assert_close(seen.sum(-1) + earlier, torch.ones(4, case.probe.n))


def test_rows_of_a_prompt(prompts) -> None:
    probe = prompts.make(3, 2, [Grid(2, 3), Grid(1, 2)], question=3).probe
    assert probe.question.tolist() == [probe.n - 3, probe.n - 2, probe.n - 1] and probe.last.tolist() == [probe.n - 1]
    assert sorted([*probe.text.tolist(), *probe.visual.tolist()]) == list(range(probe.n))
    without = prompts.make(3, 2, [Grid(2, 3)], question=0).probe
    assert without.question.tolist() == without.last.tolist() == [without.n - 1]
    assert without.attention(without.text).shape == (0, 6) and not without.received(without.text).any()
