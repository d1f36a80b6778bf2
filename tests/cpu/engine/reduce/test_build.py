"""Methods by name: messages name mistakes, and the list for GET /v1/vlm/methods is complete."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

import foveate.engine.prune.methods as prune_family
import foveate.engine.reduce.methods as family
from foveate.configs.errors import ConfigError
from foveate.engine.common import MethodInfo, names
from foveate.engine.methods import build_reducer, describe
from foveate.engine.reduce.methods.divprune import DivPrune
from foveate.engine.reduce.methods.visionzip import VisionZip


def test_the_seven_methods_are_found() -> None:
    assert {"divprune", "fastervlm", "none", "pool", "random", "uniform", "visionzip"} <= set(names(family))


def test_a_folder_of_further_methods(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from foveate.engine.reduce.methods.none import METHOD\n")
    (tmp_path / "none.py").write_text("METHOD = None\n")
    code = (
        "from foveate.engine.methods import build_reducer as build\n"
        "print(type(build('mine', {})).__name__, type(build('none', {})).__name__)"
    )
    environment = {**os.environ, "FOVEATE_REDUCERS": str(tmp_path)}
    told = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
    assert told.stdout.split() == ["Keep", "Keep"], "found by its file's name; ours wins over one of the same name"


def test_fields_are_set_over_the_defaults() -> None:
    assert build_reducer("divprune", {"start": "farthest_pair"}) == DivPrune(start="farthest_pair")
    assert build_reducer("visionzip", {"contextual_ratio": 0}) == VisionZip(contextual_ratio=0.0)
    assert build_reducer("visionzip", {}) == VisionZip()


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("divprun", {}, r"reduce\.method: no 'divprun', did you mean 'divprune'; there are .*divprune, "),
        ("os", {}, r"reduce\.method: no 'os'; there are"),
        ("primitives", {}, r"reduce\.method: no 'primitives'"),
        ("visionzip", {"compt": True}, r"visionzip\.compt: no such field, did you mean 'compat'; its fields are cont"),
        ("none", {"x": 1}, r"reduce\.none\.x: no such field; it has no fields"),
        ("visionzip", {"compat": 1}, r"reduce\.visionzip\.compat: 1 is not bool; the default is False"),
        ("random", {"seed": True}, r"random\.seed: True is not int"),
        ("random", {"seed": 1.0}, r"random\.seed: 1.0 is not int"),
        ("divprune", {"start": "middle"}, r"start: 'middle' is not \"isolated\" \| \"farthest_pair\"; the default"),
        ("visionzip", {"contextual_ratio": 1.0}, r"reduce\.visionzip\.contextual_ratio: 1.0 is not in \[0, 1\)"),
        ("visionzip", {"contextual_ratio": -1}, r"contextual_ratio: -1.0 is not in"),
        ("visionzip", {"contextual_ratio": float("nan")}, r"contextual_ratio: nan is not a finite number"),
        ("visionzip", {"contextual_ratio": "0.1"}, r"contextual_ratio: '0.1' is not float"),
    ],
)
def test_mistakes_are_named(name: str, params: dict[str, bool | int | float | str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_reducer(name, params)
    assert "\n" not in str(caught.value)


def test_describe_says_all_there_is_and_crosses_the_wire() -> None:
    methods = describe()
    told = [*names(family), *names(prune_family)]
    assert [method.name for method in methods] == told and len(set(told)) == len(told), "names are unique across both"
    assert {method.name for method in methods if method.stage == "decoder"} == set(names(prune_family))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(methods), type=list[MethodInfo]) == methods
    by_name = {method.name: method for method in methods}
    zip_info = by_name["visionzip"]
    assert [(f.name, f.type, f.default) for f in zip_info.fields] == [
        ("contextual_ratio", "float", 0.15625),
        ("compat", "bool", False),
    ]
    assert zip_info.signals_cls == ["cls_row(22)", "enc", "keys(22)"]
    assert zip_info.signals_no_cls == ["enc", "keys(31)", "recv(31)"]
    assert by_name["divprune"].fields[0].type == '"isolated" | "farthest_pair"'
    assert by_name["divprune"].source == "arXiv:2503.02175"
    for method in methods:
        assert method.summary.endswith((".", ";")) or len(method.summary) > 20
        assert method.shared is not method.question_aware


def test_budget_and_messages_do_not_import_torch() -> None:
    code = "import sys, foveate.engine.common.messages, foveate.engine.reduce.budget; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
