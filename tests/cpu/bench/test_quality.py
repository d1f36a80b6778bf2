"""The quality bench: cells that outlive a run, and tables."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest


@pytest.fixture
def quality(bench, monkeypatch, tmp_path):
    """The cells and tables of the quality bench; results go to a folder of the test's own."""
    monkeypatch.setattr(bench.quality.cells, "RESULTS", tmp_path)
    return SimpleNamespace(cells=bench.quality.cells, tables=bench.quality.table, folder=tmp_path)


def cell(quality, method="divprune", ratio=0.5, right=8, code="a", **more):
    kinds = {"colour": 10, "count": 10}
    scored = {"colour": right, "count": right // 2}
    return quality.cells.Cell(
        model="m", method=method, ratio=ratio, offered=100.0, kept=100 * ratio, right=scored, asked=kinds, code=code,
        **more,
    )  # fmt: skip


def test_a_cell_is_found_again_by_what_it_depends_on(quality):
    times = quality.cells.Times(n=3, ttft_ms=1.0, encode_ms=2.0, reduce_ms=3.0, prefill_ms=4.0, kv_bytes=5)
    first = quality.cells.Kept("q", {"command": "one"}, resume=False)
    first.put(cell(quality, times=times))
    first.put(cell(quality, ratio=0.25, right=2))
    again = quality.cells.Kept("q", {"timing": "two"}, resume=True)
    assert again.made_by == {"command": "one", "timing": "two"}
    assert again.find("m", "divprune", 0.5, "a") == cell(quality, times=times)
    assert again.find("m", "divprune", 0.5, "b") is None and again.find("m", "todre", 0.5, "a") is None
    again.put(cell(quality, right=6))
    assert again.find("m", "divprune", 0.5, "a") == cell(quality, right=6, times=times), "the times of the same code"
    again.put(cell(quality, code="b"))
    assert again.find("m", "divprune", 0.5, "b").times is None and len(again.cells) == 2
    assert len(json.loads((quality.folder / "q.json").read_text())["results"]) == 2
    assert quality.cells.Kept("q", {}, resume=False).cells == []


def test_the_code_of_a_cell_changes_with_method_model_and_questions(quality):
    codes = [
        quality.cells.code_of(*of)
        for of in (
            ("tiny-llava", "divprune", 60), ("tiny-llava", "todre", 60), ("tiny-qwen2-vl", "divprune", 60),
            ("tiny-llava", "divprune", 61), ("tiny-llava", "divprune;keep=0.5+todre", 60),
        )
    ]  # fmt: skip
    assert len(set(codes)) == len(codes)
    assert codes[0] == quality.cells.code_of("tiny-llava", "divprune", 60)


def test_the_code_of_a_cell_changes_with_the_file_of_its_method(quality, monkeypatch):
    for method in ("divprune", "fastv", "oracle"):
        code = quality.cells.code_of("tiny-llava", method, 60)
        with monkeypatch.context() as patched:
            patched.setattr(quality.cells, "METHOD_FOLDERS", ())
            assert quality.cells.code_of("tiny-llava", method, 60) != code


def test_tables_say_what_the_cells_say(quality):
    cells = [cell(quality, method, ratio, right) for ratio in (1.0, 0.5) for method, right in (
        ("none", 10), ("random", 4), ("divprune", 10), ("pool", 2), ("oracle", 10)) if (method, ratio) != ("none", 0.5)
    ]  # fmt: skip
    cells[5:6] = [replace(cells[5], right={"colour": 4, "count": 10})]  # random counts best of all
    tables = quality.tables
    everything = tables.budget_table(cells, None)
    assert "| none | 75.0 (53-89) | - |" in everything and "| pool | 15.0 (5-36) | 15.0 (5-36) |" in everything
    assert "| divprune | 100.0 | 100.0 |" in tables.budget_table(cells, "colour")
    best = tables.best_table(cells)
    assert "| all | divprune 75.0 (+1) |" in best and "| count | random 100.0 |" in best
    assert "| colour | divprune 100.0 |" in best and "oracle" not in best
    assert tables.below_random(cells) == "Below random, in points: 50 %: pool -55.0."
    assert "refused" not in tables.time_table(cells) and tables.named(cells)[0] == "divprune"


def test_wilson_interval(bench):
    wilson = bench.report.wilson
    assert wilson(97, 100) == pytest.approx((0.91548, 0.98974), abs=1e-5)  # by the formula, with another program
    assert wilson(5, 5)[1] == 1.0 and wilson(0, 5)[0] == 0.0
