"""docs/methods.md says what the method files say: the page is written again and compared."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from foveate.engine.methods import describe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def writer() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools" / "methods_page.py"))


def test_the_page_is_up_to_date(writer: dict[str, Any]) -> None:
    assert (ROOT / "docs" / "methods.md").read_text("utf-8") == writer["page"](), "run `make docs`"


def test_every_method_is_listed_once(writer: dict[str, Any]) -> None:
    """A method whose group is no heading of the page would be missing."""
    listed = re.findall(r"^\| `(\w+)` \| \*\*", writer["page"](), re.MULTILINE)
    assert sorted(listed) == sorted(info.name for info in describe())


def test_every_parameter_is_listed_with_its_default(writer: dict[str, Any]) -> None:
    listed = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `", writer["page"](), re.MULTILINE)
    assert sorted(listed) == sorted((info.name, field.name) for info in describe() for field in info.fields)
    page = writer["page"]()
    assert "| `visionzip` | `contextual_ratio` | `float` | `0.1562` |" in page
    assert '| `fopru` | `order` | `"rank" \\| "row"` | `rank` |' in page
