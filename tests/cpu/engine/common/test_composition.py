"""The rules of settings and compositions, over descriptions of methods."""

import pytest

from foveate.engine.common import FieldInfo, MethodInfo, Misplaced, Value, is_share, misplaced, setting, states_share


def info(stage: str, *, first_only: bool = False, restores: bool = False) -> MethodInfo:
    return MethodInfo(
        name="m", summary="", source="", fields=[], question_aware=False, shared=True, signals_cls=[],
        signals_no_cls=[], stage=stage, first_only=first_only, restores=restores,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        (info("pixels"), info("encoder"), None),
        (info("tokens"), info("tokens"), None),
        (info("tokens"), info("decoder"), None),
        (info("tokens"), info("encoder"), "order"),
        (info("decoder"), info("tokens"), "order"),
        (info("decoder"), info("decoder"), "decoder"),
        (info("tokens"), info("tokens", first_only=True), "grid"),
        (info("encoder", restores=True), info("encoder", first_only=True), "grid"),
        (info("pixels"), info("tokens", first_only=True), "left"),
        (info("encoder", restores=True), info("tokens", first_only=True), None),
        (info("tokens", first_only=True), info("tokens"), None),
    ],
)
def test_what_may_follow_what(before: MethodInfo, after: MethodInfo, why: Misplaced | None) -> None:
    assert misplaced(before, after) == why


@pytest.mark.parametrize(
    ("kind", "value", "held"),
    [
        ("float", 1, 1.0),
        ("float", True, None),
        ("float", float("inf"), None),
        ("float", "1", None),
        ("int", 3, 3),
        ("int", True, None),
        ("int", 3.0, None),
        ("bool", False, False),
        ("bool", 0, None),
        ("str", "any", "any"),
        ("str", 1, None),
        ('"a" | "b"', "b", "b"),
        ('"a" | "b"', "c", None),
    ],
)
def test_what_a_field_holds(kind: str, value: Value, held: Value | None) -> None:
    found = setting(FieldInfo(name="x", type=kind, default=0), value)
    assert found == held and type(found) is type(held)


def test_shares_are_numbers_up_to_one_of_all_stages_but_the_last() -> None:
    assert [is_share(value) for value in (0.5, 1, 0, 1.5, True, "1")] == [True, True, False, False, False, False]
    assert [states_share(i, 3) for i in range(3)] == [True, True, False]
