"""One row of the table declares a budget field: everything else follows from the row."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from foveate.configs.config import BudgetConfig
from foveate.engine.common import MethodInfo
from foveate.server.common import budget_fields
from foveate.server.common.budget_fields import (
    FIELDS,
    BudgetField,
    BudgetLevel,
    Count,
    Stated,
    clamp,
    header_level,
    merge,
)
from foveate.server.common.errors import ApiError
from foveate.server.common.protocol import VlmFields
from foveate.server.prepare.budget import resolve

METHOD = MethodInfo(
    name="foveal", summary="", source="", fields=[], question_aware=False, shared=True, signals_cls=[],
    signals_no_cls=[],
)  # fmt: skip

# In a process of its own: the pydantic models are made of the table when they are imported.
DUMMY = """
import json
from foveate.configs.config import BudgetConfig
from foveate.engine.common import MethodInfo
from foveate.server.common import budget_fields
from foveate.server.common.budget_fields import BudgetField, Count
budget_fields.FIELDS.append(BudgetField(
    header="VLM-Kv-Dummies", path="vlm.kv.dummies", kind=Count(("none",)), meaning="tokens of a dummy",
    clamped_by="max_tokens", resolved_as="dummies", reported="`dummies` in VLM-Resolved",
))
from foveate.configs.config import BudgetConfig
from foveate.engine.common.messages import MethodInfo
from foveate.server.common.errors import ApiError
from foveate.server.common.protocol import ChatRequest, VlmFields
from foveate.server.prepare.budget import resolve
from foveate.server.prepare.checks import check_fields
METHOD = MethodInfo(name="foveal", summary="", source="", fields=[], question_aware=False, shared=True,
                    signals_cls=[], signals_no_cls=[])

def resolved(body, headers, **config):
    fields = None if body is None else VlmFields.model_validate({"kv": body})
    try:
        return resolve(fields, [], BudgetConfig(**config), [METHOD], headers).figures
    except ApiError as error:
        return [error.param, error.message]

def valid(body):
    try:
        VlmFields.model_validate({"kv": body})
        return True
    except ValueError:
        return False

def refused(body):
    chat = {"model": "m", "messages": [{"role": "user", "content": "x"}], "vlm": {"kv": body}}
    try:
        return check_fields(ChatRequest.model_validate(chat))
    except ApiError as error:
        return [error.param, error.message]

print(json.dumps({
    "header": resolved(None, [("vlm-kv-dummies", "7")]),
    "body goes before header": resolved({"dummies": 5}, [("vlm-kv-dummies", "7")]),
    "clamped": resolved({"dummies": 50}, [], max_tokens=9),
    "word": resolved({"dummies": "none"}, []),
    "too small in a header": resolved(None, [("vlm-kv-dummies", "0")]),
    "strict": resolved(None, [("vlm-kv-dummies", "70"), ("vlm-strict", "?1")], max_tokens=9),
    "valid": [valid({"dummies": n}) for n in (1, 10**6, "none", 0, 10**6 + 1, "all", 1.5)],
    "schema": ChatRequest.model_json_schema()["$defs"]["KvFields"]["properties"]["dummies"],
    "known": [refused({"dummies": 3}), refused({"dummies": 3, "dumies": 3})],
    "documented": budget_fields.markdown(),
}))
"""


def test_a_new_field_is_one_row() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", DUMMY], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["header"] == ["floor=1", "dummies=7"]
    assert found["body goes before header"] == ["floor=1", "dummies=5"]
    assert found["clamped"] == ["floor=1", "dummies=9"] and found["word"] == ["floor=1", "dummies=none"]
    param, message = found["too small in a header"]
    assert param == "VLM-Kv-Dummies" and "1 to 1000000, none" in message
    assert found["strict"] == ["VLM-Kv-Dummies", "VLM-Kv-Dummies: 70 is more than budget.max_tokens 9"]
    assert found["valid"] == [True, True, True, False, False, False, False]
    assert {"minimum": 1, "maximum": 10**6, "type": "integer"} in found["schema"]["anyOf"]
    mistake = ["vlm.kv.dumies", "vlm.kv.dumies: no such field; did you mean vlm.kv.dummies?"]
    assert found["known"] == [None, mistake]
    assert "| `VLM-Kv-Dummies` | `vlm.kv.dummies` | a count or `none` | tokens of a dummy |" in found["documented"]


def test_headers_and_paths_are_unique() -> None:
    assert len({each.header.lower() for each in FIELDS}) == len({each.path for each in FIELDS}) == len(FIELDS)
    assert budget_fields.sections() == ["vlm", "vlm.visual"]


@pytest.mark.parametrize("each", FIELDS, ids=lambda each: each.path)
def test_every_field_is_read_from_its_header_and_refuses_nonsense(each: BudgetField) -> None:
    good = {"Count": "3", "Ratio": "0.5", "Flag": "?1", "Word": "kept_map", "Text": "area"}[type(each.kind).__name__]
    level = header_level([(each.header.lower(), good)])
    assert level.stated[each.path].where == each.header and level.value(each.path) is not None
    for texts in ([good, good], ["x" * 2000], [f"{good};a=1"] if good != "area" else ["é" * 1025]):
        with pytest.raises(ApiError) as caught:
            header_level([(each.header.lower(), text) for text in texts])
        assert caught.value.param == each.header


def test_of_several_wrong_headers_the_method_is_named_first_then_the_first_of_the_table() -> None:
    wrong = [("vlm-visual-split", "3"), ("vlm-visual-tokens", "0"), *[("vlm-visual-method", "none")] * 2]
    for name in ("VLM-Visual-Method", "VLM-Visual-Tokens", "VLM-Visual-Split"):
        with pytest.raises(ApiError) as caught:
            header_level(wrong)
        assert caught.value.param == name
        wrong = [header for header in wrong if header[0] != name.lower()]


def test_amounts_of_a_lower_level_yield_to_full_and_full_to_amounts() -> None:
    tokens, ratio, floor = ("vlm.visual.tokens", "vlm.visual.ratio", "vlm.visual.floor")
    below = BudgetLevel({ratio: Stated(0.5, "h"), floor: Stated(3, "h")})
    assert set(merge(BudgetLevel({tokens: Stated("full", "b")}), below).stated) == {tokens, floor}
    full = BudgetLevel({tokens: Stated("full", "h")})
    assert set(merge(BudgetLevel({ratio: Stated(0.5, "b")}), full).stated) == {ratio}
    assert set(merge(BudgetLevel({floor: Stated(2, "b")}), full).stated) == {floor, tokens}


def test_the_cap_bounds_only_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    free = BudgetField(header="VLM-Free", path="vlm.kv.free", kind=Count(), meaning="", amount_of="kv")
    monkeypatch.setattr(budget_fields, "FIELDS", [*FIELDS, free])
    level = BudgetLevel({free.path: Stated(50, "b"), "vlm.visual.floor": Stated(50, "b")})
    bounded = clamp(level, BudgetConfig(max_tokens=9))
    assert (bounded.count(free.path), bounded.count("vlm.visual.floor")) == (50, 9)
    assert clamp(level, BudgetConfig()).stated == level.stated
    other = BudgetLevel({"vlm.visual.tokens": Stated("full", "b")})
    assert free.path in merge(other, level).stated, "amounts of one thing do not cancel those of another"


def test_options_of_the_body_leave_their_headers_unread_and_strict_comes_first() -> None:
    headers = [("vlm-strict", "1"), ("vlm-explain", "foo")]
    body = VlmFields.model_validate({"strict": False, "explain": "kept_map"})
    assert resolve(body, [], BudgetConfig(), [METHOD], headers).explain == "kept_map"
    mistakes = [
        ("vlm-strict", "?1"),
        ("vlm-visual-ratio", "7"),
        ("vlm-visual-nonsense", "1"),
        ("vlm-explain", "foo"),
    ]
    for name in ("vlm-visual-nonsense", "VLM-Visual-Ratio", "VLM-Explain"):
        with pytest.raises(ApiError) as caught:
            resolve(None, [], BudgetConfig(), [METHOD], mistakes)
        assert caught.value.param == name
        mistakes = [header for header in mistakes if header[0] != name.lower()]
    split = VlmFields.model_validate({"visual": {"split": ""}})
    assert resolve(split, [], BudgetConfig(), [METHOD], [("vlm-visual-split", "uniform")]).visual.split == "uniform"


def test_the_documented_table_is_that_of_the_fields() -> None:
    page = (Path(__file__).resolve().parents[4] / "docs" / "usage.md").read_text()
    table = page.partition("<!-- budget fields: begin")[2].partition("-->\n")[2].partition("<!-- budget fields: end")[0]
    assert table == budget_fields.markdown(), "run make docs"
