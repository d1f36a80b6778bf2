"""What a reader and the packaging rely on: links, registrations, commands, sizes, versions."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import foveate
import foveate.engine.reduce.methods as reduce
from foveate.engine.common import load_method, names
from foveate.engine.reduce.base import Reducer

ROOT = Path(__file__).resolve().parents[2]
LINKS = ("server", "engine", "kernels", "configs", "tune")
MAX_LINES = 500
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("name", LINKS)
def test_the_package_is_made_of_links(name: str) -> None:
    link = ROOT / "foveate" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert (link / "__init__.py").is_file()


def test_every_reducer_declares_itself() -> None:
    found = names(reduce)
    assert {"none", "random", "uniform", "pool", "fastervlm", "divprune", "visionzip"} <= set(found)
    for name in found:
        assert issubclass(load_method(reduce, name), Reducer), f"engine/reduce/methods/{name}.py: METHOD is no Reducer"


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/usage.md", ".ci/run"])
def test_commands_that_are_promised_exist(page: str) -> None:
    # Outside code, "make" is an ordinary word.
    text = (ROOT / page).read_text()
    code = text if page == ".ci/run" else "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))
    promised = set(re.findall(r"\bmake ([a-z]+)", code))
    assert promised, f"{page} names no make target"
    assert promised <= targets()


def test_help_names_every_target() -> None:
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^  make ([a-z]+)", shown, re.MULTILINE)) == targets()


@pytest.mark.parametrize("page", PAGES)
def test_files_that_pages_name_exist(page: str) -> None:
    """Every path in a link or in backquotes that starts with a folder of ours and ends in a suffix."""
    text = (ROOT / page).read_text()
    folders = "bench|configs|docs|engine|foveate|kernels|server|tests|tools|tune"
    named = set(re.findall(rf"`((?:{folders})/[\w./-]+\.(?:py|md|toml|yaml))`", text))
    named |= {target for target in re.findall(r"\]\(([\w./-]+)\)", text)}
    base = ROOT if "/" not in page else ROOT / "docs"
    missing = [path for path in sorted(named) if not ((ROOT / path).exists() or (base / path).exists())]
    assert not missing, f"{page} names {missing}"


def test_the_first_page_is_short() -> None:
    """What needs more words belongs into docs/."""
    assert len((ROOT / "README.md").read_text().split()) < 900


def test_a_request_passes_few_files() -> None:
    text = (ROOT / "docs" / "request.md").read_text()
    named = set(re.findall(r"`((?:configs|engine|kernels|server)/[\w./-]+\.py)`", text))
    hops = re.findall(r"^(\d+)\. \*\*", text, re.MULTILINE)
    assert hops == [str(i) for i in range(1, 12)] and 11 <= len(named) <= 20, sorted(named)


def python_files() -> list[Path]:
    folders = ("bench", "configs", "engine", "foveate/bundled", "kernels", "server", "tests", "tools", "tune")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_no_file_is_far_longer_than_the_guide() -> None:
    """About 300 lines is the guide, and ruff counts statements and parameters. A file above this limit is two files."""
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files()}
    found = [f"{name}: {n} lines" for name, n in lines.items() if n > MAX_LINES]
    assert not found, "\n".join(found)


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == foveate.__version__
    assert f"## [{foveate.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.lstrip().startswith("Apache License")
    assert "END OF TERMS AND CONDITIONS" in text
