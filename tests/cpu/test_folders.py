"""Folders of engine/ and server/: no two import each other, and few modules know many others. Read from the source."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_EDGES = 150  # between modules of engine/, files of methods and families left out
PLUG_INS = ("METHOD", "FAMILY")  # what a file of a method or a family binds
Edge = tuple[str, str]


def modules(layer: str) -> dict[str, Path]:
    """Files by dotted name, packages under the name of their folder."""
    paths = sorted((ROOT / layer).rglob("*.py"))
    names = (path.relative_to(ROOT).with_suffix("").parts for path in paths)
    dotted = (".".join(("foveate", *(parts[:-1] if parts[-1] == "__init__" else parts))) for parts in names)
    return dict(zip(dotted, paths, strict=True))


def edges(name: str, tree: ast.AST, known: Iterable[str]) -> Iterator[Edge]:
    """The modules among `known` that one file imports, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield name, inner if inner in known else node.module
        elif isinstance(node, ast.Import):
            yield from ((name, alias.name) for alias in node.names)


def all_edges(layer: str) -> set[Edge]:
    known = modules(layer)
    found = {edge for name, path in known.items() for edge in edges(name, ast.parse(path.read_text()), known)}
    return {(a, b) for a, b in found if b in known and a != b}


def folder(name: str, known: dict[str, Path]) -> str:
    return str(known[name].parent.relative_to(ROOT))


def mutual(found: set[Edge], known: dict[str, Path]) -> set[Edge]:
    """Pairs of folders that import each other. Files directly in a layer are one folder above the others."""
    between = {(folder(a, known), folder(b, known)) for a, b in found}
    return {(a, b) for a, b in between if a < b and (b, a) in between}


def is_plug_in(path: Path) -> bool:
    lines = path.read_text().splitlines()
    return any(line.startswith(f"{name} = ") for line in lines for name in PLUG_INS) or path.parent.name == "split"


@pytest.mark.parametrize("layer", ["engine", "server"])
def test_no_two_folders_import_each_other(layer: str) -> None:
    found = all_edges(layer)
    assert len(found) > 50, "there is something to check"
    assert not mutual(found, modules(layer))


@pytest.mark.parametrize(
    ("inside", "line"),
    [
        ("foveate.engine.cache.pool", "from foveate.engine.sequence import Sequence"),
        ("foveate.engine.models.parts.layers", "def f():\n    from foveate.engine.models import base"),
        ("foveate.engine.reduce.base", "import foveate.engine.reduce.methods.divprune"),
        ("foveate.server.prepare.budget", "from foveate.server.routes.chat import answer_chat"),
    ],
)
def test_an_import_in_the_other_direction_is_found(inside: str, line: str) -> None:
    layer = inside.split(".")[1]
    known = modules(layer)
    assert len(mutual(all_edges(layer) | set(edges(inside, ast.parse(line), known)), known)) == 1


def test_modules_of_the_engine_know_few_others() -> None:
    known = modules("engine")
    counted = {(a, b) for a, b in all_edges("engine") if not is_plug_in(known[a]) and not is_plug_in(known[b])}
    assert len(counted) <= MOST_EDGES, f"{len(counted)} imports between modules of engine/"
