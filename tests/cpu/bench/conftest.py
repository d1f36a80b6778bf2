"""The package `bench`, and a shape small enough to build in a test."""

import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path

import pytest

_FOLDER = Path(__file__).parents[3] / "bench"


@pytest.fixture(scope="session")
def bench():
    """The package with all its modules imported.

    Not through sys.path: the repository's root there would show `transformers` our folder `kernels`.
    """
    if "bench" not in sys.modules:
        where = {"submodule_search_locations": [str(_FOLDER)]}
        spec = importlib.util.spec_from_file_location("bench", _FOLDER / "__init__.py", **where)
        sys.modules["bench"] = importlib.util.module_from_spec(spec)
    for module in pkgutil.walk_packages([str(_FOLDER)], "bench."):
        importlib.import_module(module.name)
    return sys.modules["bench"]


@pytest.fixture
def small_shape(bench):
    return bench.random_model.shape.Shape(
        hidden=64,
        layers=2,
        heads=4,
        kv_heads=2,
        inner=96,
        vocab=1100,
        context=512,
        tower_hidden=32,
        tower_layers=3,
        tower_heads=2,
        tower_inner=64,
        side=56,
    )


@pytest.fixture
def row(bench):
    """A function that makes a measured row of the comparison: `row(name, form, measure=[values])`."""
    table = bench.peers.table

    def make(name, form="", **measured):
        made = table.Row(table.Variant(name, "ours" if "ours" in name else "vllm", form))
        for measure, values in measured.items():
            for value in values:
                made.add(measure, value)
        return made

    return make
