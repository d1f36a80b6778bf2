"""Measurements on disk: kept apart by run, whole or not there."""

from pathlib import Path

import pytest

from foveate.configs.errors import ConfigError
from foveate.tune.measure import Reference
from foveate.tune.state import State

ONE = Reference([(1, 2), ()], 3)


def test_values_come_back_in_the_same_run_alone(tmp_path: Path) -> None:
    file = tmp_path / "state.jsonl"
    State(file, "a").put("x", ONE)
    State(file, "b").put("x", Reference([], None))
    assert State(file, "a").get("x", Reference) == ONE
    assert State(file, "b").get("x", Reference) == Reference([], None)
    assert State(file, "a").get("y", Reference) is None and State(file, "c").get("x", Reference) is None


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "state.jsonl"
    state = State(file, "a")
    state.put("x", ONE)
    state.put("y", ONE)
    file.write_bytes(file.read_bytes()[:-cut])
    state = State(file, "a")
    assert state.get("x", Reference) == ONE and state.get("y", Reference) is None
    state.put("y", Reference([], 1))
    assert State(file, "a").get("y", Reference) == Reference([], 1)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "state.jsonl"
    State(file, "a").put("x", ONE)
    file.write_text(file.read_text() + "{\n")
    with pytest.raises(ConfigError, match=r"state\.jsonl:2: broken .*delete the file"):
        State(file, "a")
    file.write_text('{"run": "a", "key": "x", "value": 3}\n')
    with pytest.raises(ConfigError, match="x: Expected `object`.*delete the file"):
        State(file, "a").get("x", Reference)
