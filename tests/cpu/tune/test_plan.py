"""A whole run on made-up answers: what it finds, that it can be killed anywhere, and what it writes."""

import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import yaml

import foveate.bundled
from foveate.configs.load import load
from foveate.engine.common import Image, TokenLogprob, VisualUsage
from foveate.engine.methods import build_pruner, describe
from foveate.engine.models.loader import load_model
from foveate.engine.prune.depth import plan as layer_groups
from foveate.server.prepare.stages import read_method
from foveate.tune import plan, report
from foveate.tune.asking import Asked, LayerCost, Outcome
from foveate.tune.confidence import allowed_misses
from foveate.tune.data import PARTS, SEARCH
from foveate.tune.heads import Heads
from foveate.tune.measure import SCHEDULE, Bench, Measured, Tally, design_effect
from foveate.tune.state import State

N_LAYERS, OFFERED = 4, 144
METHODS = describe()
MODEL = load_model(foveate.bundled.path("tiny-llava"), torch.float32, "cpu")
HEADS = Heads(8, [[0.1, 0.9]] * N_LAYERS, [[0.5, 0.25]] * N_LAYERS, [(0, 1)])


class MadeUp:
    """Answers that stay the same the likelier, the more visual tokens the deeper layers hold; drawn from the text of
    pair and method. `left` questions on, it is killed."""

    def __init__(self, left: float = float("inf")) -> None:
        self.model = MODEL
        self.layer = LayerCost(1000, 64)
        self.calls: list[tuple[str, float, str]] = []
        self._left = left
        self.told: list[str] = []

    def ask(
        self, asked: Sequence[Asked], method: str, ratio: float, max_tokens: int, logprobs: int | None = None
    ) -> list[Outcome]:
        if self._left <= 0:
            raise KeyboardInterrupt
        self._left -= 1
        self.calls.append((method, ratio, f"{asked[0].where} {max_tokens}"))
        visual = self._visual(method, ratio)
        chance = 1 - (1 - visual.mean / OFFERED) ** 3 * 0.2
        out = []
        for one in asked:
            digest = hashlib.sha256(f"{one.where} {method} {ratio}".encode()).digest()
            same = method == "none" or int.from_bytes(digest[:4]) / 2**32 < chance
            top = TokenLogprob(token_id=1, logprob=-0.5, top=[(1, -0.5 if same else -2.0), (2, -1.5)])
            out.append(Outcome((1, 2) if same else (1, 3), 10, visual, (top,)))
        return out

    def text(self, token_ids: Sequence[int]) -> str:
        return " ".join(map(str, token_ids))

    def _visual(self, text: str, ratio: float) -> VisualUsage:
        method = read_method("m", text, METHODS)
        allowed = max(1, int(ratio * OFFERED + 0.5))
        entered = OFFERED if method.prune and method.name == "none" else allowed
        if method.prune is None:
            return VisualUsage(offered=OFFERED, kept=entered, mean=entered)
        groups = layer_groups(build_pruner(method.prune), [entered], allowed, N_LAYERS)
        counts = [(group.layers.start, sum(group.counts)) for group in groups]
        mean = sum(sum(group.counts) * len(group.layers) for group in groups) / N_LAYERS
        return VisualUsage(offered=OFFERED, kept=entered, mean=mean, layers=counts if len(counts) > 1 else [])


def parts() -> dict[str, list[Asked]]:
    """Pairs with a picture each."""

    def pair(where: str) -> Asked:
        return Asked([1], Image(pixels=b"", height=0, width=0, digest=where.encode()), [], "1 2", where)

    sizes = dict(zip(PARTS, (200, 200, 400), strict=True))
    return {name: [pair(f"{name} {i}") for i in range(n)] for name, n in sizes.items()}


def run(folder: Path, left: float = float("inf")) -> tuple[plan.Result, MadeUp, Bench]:
    asker = MadeUp(left)
    bench = Bench(asker, parts(), State(folder / "state.jsonl", "run"), 8, asker.told.append)
    try:
        return plan.run(bench, 0.97, ["divprune", "uniform"], 1, 0, range(9)), asker, bench
    except KeyboardInterrupt:
        raise Killed(asker) from None


class Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def no_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "find_heads", lambda model, words, seed: HEADS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[plan.Result, MadeUp, Bench]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "find_heads", lambda model, words, seed: HEADS)
        yield run(tmp_path_factory.mktemp("whole"))


def test_nothing_is_measured_twice(whole) -> None:
    _, asker, _ = whole
    assert len(asker.calls) == len(set(asker.calls))
    assert len(asker.told) <= plan.expected_steps(N_LAYERS, 2)


def test_what_is_found_holds(whole) -> None:
    result, _, _ = whole
    target = result.target
    assert 0.97 < target < 1 and result.schedule.holds(target) and result.schedule.cost < 1
    assert result.both is not None and result.both.holds(target)
    for reducer in result.reducers:
        cheaper = [p for p in result.points if p.method == reducer.method and p.cost < reducer.cost]
        assert reducer.holds(target) and cheaper, "it was bisected"
        assert not any(p.holds(target) for p in cheaper)


def test_what_is_chosen_was_confirmed(whole) -> None:
    result, _, _ = whole
    most = allowed_misses(400, 0.97)
    assert result.confirmed.asked == 400 and result.confirmed.misses <= most and result.confirmed.cost < 1
    assert result.confirmed in result.tests and all(p.misses <= most for p in result.tests if p != result.failed)
    tested = [(c.search.method, c.search.ratio) for c in reversed(result.candidates)]
    assert [(p.method, p.ratio) for p in result.tests] == tested[: len(result.tests)]
    assert all(c.misses <= result.limit for c in result.candidates)


def test_a_hopeless_point_is_not_asked_every_pair(whole) -> None:
    result, _, _ = whole
    assert any(p.asked < 200 for p in result.points)
    assert all(p.asked == 200 for p in result.points if p.holds(result.target))


@pytest.mark.parametrize("left", [0, 1, 7, 20, 33])
def test_killed_anywhere_it_goes_on(tmp_path: Path, whole, left: int) -> None:
    expected, alone, _ = whole
    with pytest.raises(Killed) as killed:
        run(tmp_path, left)
    first: MadeUp = killed.value.args[0]
    result, second, _ = run(tmp_path)
    assert result == expected
    repeated = [call for call in second.calls if call in first.calls]
    assert all(call[2].endswith(" 1") for call in repeated), "but for passes of one value that takes several"
    assert len(first.calls) + len(second.calls) - len(repeated) == len(alone.calls)
    result, third, _ = run(tmp_path)
    assert result == expected and third.calls == []


def test_another_agreement_reuses_what_was_measured(tmp_path: Path) -> None:
    run(tmp_path)
    asker = MadeUp()
    bench = Bench(asker, parts(), State(tmp_path / "state.jsonl", "run"), 8, lambda text: None)
    plan.run(bench, 0.9, ["divprune", "uniform"], 1, 0, range(9))
    fresh = MadeUp()
    bench = Bench(fresh, parts(), State(tmp_path / "other.jsonl", "run"), 8, lambda text: None)
    plan.run(bench, 0.9, ["divprune", "uniform"], 1, 0, range(9))
    assert 0 < len(asker.calls) < len(fresh.calls)


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw", lambda out, agreement, result: [])


def setting(result: plan.Result) -> report.Setting:
    counts = {name: len(part) for name, part in parts().items()}
    return report.Setting(
        model="tiny-llava", data="data.jsonl", agreement=0.97, seed=0, max_tokens=8, every=1, counts=counts,
        n_pictures=counts, right=dict.fromkeys(counts, 100),
    )  # fmt: skip


def test_the_preset_is_what_the_server_loads(tmp_path: Path, whole, no_plots) -> None:
    result, _, _ = whole
    lines = report.write(tmp_path, setting(result), result)
    config = load(tmp_path / "preset.yaml")
    assert (config.model.path, config.budget.method, config.budget.ratio) == (
        "tiny-llava", result.confirmed.method, result.confirmed.ratio,
    )  # fmt: skip
    assert f"{result.confirmed.same} of 400 held-out pairs" in lines[1]
    assert set(yaml.safe_load((tmp_path / "preset.yaml").read_text())) == {"model", "budget"}
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["heads"]["retrieval"] == [[0, 1]] and document["horizon"] == result.horizon
    assert [p["same"] for p in document["points"]] == [p.same for p in result.points]


def test_the_report_has_every_point_and_no_broken_table(tmp_path: Path, whole, no_plots) -> None:
    result, _, _ = whole
    report.write(tmp_path, setting(result), result)
    text = (tmp_path / "report.md").read_text()
    for point in result.points:
        assert f"| `{point.method}` | {point.ratio:g} |" in text
    for is_row, group in itertools.groupby(text.splitlines(), key=lambda line: line.startswith("|")):
        if is_row:
            assert len({line.count("|") for line in group}) == 1
    assert "layer 0 head 1" in text


def test_plots_are_drawn_where_matplotlib_is(tmp_path: Path, whole) -> None:
    pytest.importorskip("matplotlib")
    result, _, _ = whole
    report.write(tmp_path, setting(result), result)
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("frontier.png", "layers.png"))
    assert "(frontier.png)" in (tmp_path / "report.md").read_text()


def test_without_matplotlib_the_report_says_so(tmp_path: Path, whole, monkeypatch: pytest.MonkeyPatch) -> None:
    result, _, _ = whole

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("foveate.tune.plots.importlib.import_module", missing)
    report.write(tmp_path, setting(result), result)
    assert "pip install foveate[tune]" in (tmp_path / "report.md").read_text()
    assert not list(tmp_path.glob("*.png"))


def test_what_moves_between_two_distributions() -> None:
    assert plan.moved({1: 0.5, 2: 0.25}, {1: 0.5, 2: 0.25}) == 0.0
    assert plan.moved({1: 1.0}, {2: 1.0}) == 1.0
    assert plan.moved({1: 0.5, 2: 0.25}, {1: 0.25, 2: 0.5}) == pytest.approx(0.25)


@pytest.mark.parametrize(("size", "share"), [(1, 0.1), (7, 0.02), (7, 0.4), (7, 0.8)])
@pytest.mark.parametrize("together", [False, True])
def test_the_design_effect_is_one_for_independent_answers_and_the_size_of_pictures_for_equal_ones(
    tmp_path: Path, size: int, share: float, together: bool
) -> None:
    """However many answers change."""
    n, rng = 7 * 300, random.Random(f"{size} {share} {together}")
    pictures = [i // size for i in range(n)]
    bad = [rng.random() < share for _ in range(n)]
    changed = [i for i in range(n) if bad[pictures[i] if together else i]]
    asked = [Asked([1], Image(pixels=b"", height=0, width=0, digest=b"%d" % p), [], None, "") for p in pictures]
    bench = Bench(MadeUp(), {SEARCH: asked}, State(tmp_path / "state.jsonl", "run"), 8, print)
    tally = Tally(
        changed=changed, asked=n, right=None, offered=1, entering=1, layers=[1], flops=1, flops_unpruned=1
    )  # fmt: skip
    point = Measured(
        kind=SCHEDULE, method="m", ratio=1.0, same=n - len(changed), asked=n, spread=bench._spread(SEARCH, tally),
        right=None, entering=1.0, layers=[1.0], flops=1.0,
    )  # fmt: skip
    assert design_effect([point]) == pytest.approx(size if together else 1, rel=0.2)
    assert design_effect([]) == 1.0
