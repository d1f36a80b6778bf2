"""The quality bench's own parts: cells that outlive a run, tables."""

import importlib
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

_FOLDER = Path(__file__).parents[3] / "bench"


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The benches' modules, not through sys.path (see test_bench.py); results go to a folder of the test's own."""
    if "bench" not in sys.modules:
        where = {"submodule_search_locations": [str(_FOLDER)]}
        spec = importlib.util.spec_from_file_location("bench", _FOLDER / "__init__.py", **where)
        sys.modules["bench"] = importlib.util.module_from_spec(spec)
    cells, tables = (importlib.import_module(f"bench.{name}") for name in ("quality_cells", "quality_table"))
    monkeypatch.setattr(cells, "RESULTS", tmp_path)
    return SimpleNamespace(cells=cells, tables=tables, folder=tmp_path)


def cell(bench, method="divprune", ratio=0.5, right=8, code="a", **more):
    kinds = {"colour": 10, "count": 10}
    scored = {"colour": right, "count": right // 2}
    return bench.cells.Cell(
        model="m", method=method, ratio=ratio, offered=100.0, kept=100 * ratio, right=scored, asked=kinds, code=code,
        **more,
    )  # fmt: skip


def test_a_cell_is_found_again_by_what_it_depends_on(bench):
    times = bench.cells.Times(n=3, ttft_ms=1.0, encode_ms=2.0, reduce_ms=3.0, prefill_ms=4.0, kv_bytes=5)
    first = bench.cells.Kept("q", {"command": "one"}, resume=False)
    first.put(cell(bench, times=times))
    first.put(cell(bench, ratio=0.25, right=2))
    again = bench.cells.Kept("q", {"timing": "two"}, resume=True)
    assert again.made_by == {"command": "one", "timing": "two"}
    assert again.find("m", "divprune", 0.5, "a") == cell(bench, times=times)
    assert again.find("m", "divprune", 0.5, "b") is None and again.find("m", "todre", 0.5, "a") is None
    again.put(cell(bench, right=6))
    assert again.find("m", "divprune", 0.5, "a") == cell(bench, right=6, times=times), "the times of the same code"
    again.put(cell(bench, code="b"))
    assert again.find("m", "divprune", 0.5, "b").times is None and len(again.cells) == 2
    assert len(json.loads((bench.folder / "q.json").read_text())["results"]) == 2
    assert bench.cells.Kept("q", {}, resume=False).cells == []


def test_the_code_of_a_cell_changes_with_method_model_and_questions(bench):
    codes = [
        bench.cells.code_of(*of)
        for of in (
            ("tiny-llava", "divprune", 60), ("tiny-llava", "todre", 60), ("tiny-qwen2-vl", "divprune", 60),
            ("tiny-llava", "divprune", 61), ("tiny-llava", "divprune;keep=0.5+todre", 60),
        )
    ]  # fmt: skip
    assert len(set(codes)) == len(codes)
    assert codes[0] == bench.cells.code_of("tiny-llava", "divprune", 60)


def test_tables_say_what_the_cells_say(bench):
    cells = [cell(bench, method, ratio, right) for ratio in (1.0, 0.5) for method, right in (
        ("none", 10), ("random", 4), ("divprune", 10), ("pool", 2), ("oracle", 10)) if (method, ratio) != ("none", 0.5)
    ]  # fmt: skip
    cells[5:6] = [replace(cells[5], right={"colour": 4, "count": 10})]  # random counts best of all
    tables = bench.tables
    everything = tables.budget_table(cells, None)
    assert "| none | 75.0 (53-89) | - |" in everything and "| pool | 15.0 (5-36) | 15.0 (5-36) |" in everything
    assert "| divprune | 100.0 | 100.0 |" in tables.budget_table(cells, "colour")
    best = tables.best_table(cells)
    assert "| all | divprune 75.0 (+1) |" in best and "| count | random 100.0 |" in best
    assert "| colour | divprune 100.0 |" in best and "oracle" not in best
    assert tables.below_random(cells) == "Below random, in points: 50 %: pool -55.0."
    assert "refused" not in tables.time_table(cells) and tables.named(cells)[0] == "divprune"
