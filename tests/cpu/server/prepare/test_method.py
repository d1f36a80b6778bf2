"""Methods, compositions, ways of sharing and explanations on the wire."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.configs.config import BudgetConfig
from foveate.engine.common import FieldInfo, MethodInfo, Stage
from foveate.server.answer.usage import kept_map
from foveate.server.common.errors import ApiError
from foveate.server.prepare.stages import read_method


def method(name: str, stage: str = "tokens", first: bool = False, aware: bool = False, **types: str) -> MethodInfo:
    fields = [FieldInfo(name=key, type=kind, default=0) for key, kind in types.items()]
    return MethodInfo(
        name=name, summary="", source="", fields=fields, question_aware=aware, shared=not aware, signals_cls=[],
        signals_no_cls=[], stage=stage, first_only=first,
    )  # fmt: skip


METHODS = [
    method("pixelprune", "pixels"), method("evit", "encoder"), method("pool", first=True),
    method("hiprune", alpha="float", compat="bool", rows="int", how='"mean" | "max"', note="str"),
    method("cdpruner", aware=True), method("fastv", "decoder", aware=True, k="int", r="float"),
    method("horizon", "decoder"),
]  # fmt: skip


def test_one_method_with_parameters() -> None:
    read = read_method("w", 'hiprune;alpha=1;compat;rows=3;how=max;note="a+b"', METHODS)
    assert (read.name, read.stages, read.question_aware) == ("hiprune", [], False)
    assert read.params == {"alpha": 1.0, "compat": True, "rows": 3, "how": "max", "note": "a+b"}
    assert isinstance(read.params["alpha"], float)


def test_a_composition() -> None:
    read = read_method("w", "pixelprune+hiprune;keep=0.5;alpha=0.2 + cdpruner", METHODS)
    assert (read.name, read.params, read.question_aware) == ("pixelprune+hiprune+cdpruner", {}, True)
    assert read.stages == [
        Stage(method="pixelprune"), Stage(method="hiprune", params={"alpha": 0.2}, keep=0.5), Stage(method="cdpruner"),
    ]  # fmt: skip


def test_a_method_inside_the_decoder_comes_last() -> None:
    alone = read_method("w", "fastv;k=2;r=0.5", METHODS)
    assert (alone.name, alone.stages, alone.enter) == ("none", [], None)
    assert alone.prune == Stage(method="fastv", params={"k": 2, "r": 0.5})
    assert not alone.question_aware, "no reducer reads the question"
    behind = read_method("w", "hiprune;alpha=0.2;keep=0.4+fastv", METHODS)
    assert (behind.name, behind.params, behind.enter) == ("hiprune", {"alpha": 0.2}, 0.4)
    assert behind.prune == Stage(method="fastv")
    third = read_method("w", "pixelprune;keep=0.9+cdpruner+horizon", METHODS)
    assert third.name == "pixelprune+cdpruner" and third.question_aware and third.enter is None
    assert [stage.keep for stage in third.stages] == [0.9, None] and third.prune == Stage(method="horizon")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fastv+hiprune", "hiprune acts on tokens, so it comes before fastv"),
        ("fastv+horizon", "fastv and horizon both act inside the decoder; one can"),
        ("nosuch", "no method 'nosuch'; there are pixelprune, evit, pool, hiprune, cdpruner, fastv, horizon"),
        ("hiprune;beta=1", r"no setting 'beta'; its settings are alpha \(float\), compat \(bool\), .*/v1/vlm/methods"),
        ("pool;x=1", "pool has no setting 'x'; it has none"),
        ("hiprune;alpha=yes", "hiprune;alpha: expected float"),
        ("hiprune;rows=1.5", "hiprune;rows: expected int"),
        ("hiprune;how=min", 'hiprune;how: expected "mean" | "max"'),
        ("hiprune;keep=0.5", "hiprune has no setting 'keep'"),
        ("cdpruner;keep=0+hiprune", "cdpruner;keep: expected a number above 0 and up to 1"),
        ("cdpruner;keep=?1+hiprune", "cdpruner;keep: expected a number"),
        ("hiprune+pool", "pool needs the whole picture, so it cannot come after hiprune"),
        ("hiprune+evit", "evit acts on encoder, so it comes before hiprune"),
        ("+hiprune", "joined by"), ("hiprune+", "joined by"), ("", "joined by"), ("hiprune++pool", "joined by"),
        ("+".join(["hiprune"] * 5), "5 stages; there may be 4"),
    ],
)  # fmt: skip
def test_mistakes_list_what_is_legal(text: str, message: str) -> None:
    with pytest.raises(ApiError, match=message):
        read_method("w", text, METHODS)


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_kept_maps_are_run_lengths(survives: list[bool]) -> None:
    runs = kept_map([i for i, kept in enumerate(survives) if kept], len(survives))
    assert sum(runs) == len(survives) and all(runs[1:])
    assert [i % 2 == 1 for i, n in enumerate(runs) for _ in range(n)] == survives


def test_the_servers_default_is_read_like_a_header(make_api: Any, png: str, image_part: Any) -> None:
    api = make_api(budget=BudgetConfig(method="foveal;alpha=0.25+fastv;k=1"))
    assert api.chat([image_part(png)]).status_code == 200
    [request] = api.client.requests
    assert request.visual.params == {"alpha": 0.25} and request.visual.prune == Stage(method="fastv", params={"k": 1})


def test_header_and_body_say_the_same(make_api: Any, png: str, image_part: Any) -> None:
    api = make_api()
    api.chat([image_part(png)], headers={"VLM-Visual-Split": "uniform", "VLM-Explain": "kept_map",
                                         "VLM-Visual-Method": "foveal+foveal"})  # fmt: skip
    visual = {"split": "uniform", "method": "foveal+foveal"}
    api.chat([image_part(png)], vlm={"visual": visual, "explain": "kept_map"})
    api.chat([image_part(png)])
    by_header, by_body, plain = api.client.requests
    assert by_header.visual == by_body.visual and by_header.visual.split == "uniform"
    assert len(by_header.visual.stages) == 2 and by_header.explain == by_body.explain == "kept_map"
    assert (plain.visual.split, plain.explain, plain.visual.stages, plain.question_ids) == ("area", "", [], [])
    reply = api.chat([image_part(png)], headers={"VLM-Visual-Method": "foveal;keep=0.5+fastv;k=3"})
    [*_, pruned] = api.client.requests
    assert (pruned.visual.method, pruned.visual.enter) == ("foveal", 0.5)
    assert pruned.visual.prune == Stage(method="fastv", params={"k": 3})
    visual = reply.json()["usage"]["vlm"]["visual"]
    assert (visual["method"], visual["kept"], visual["kept_mean"]) == ("foveal+fastv", 36, 18.0)
    assert visual["by_layer"] == [[0, 36], [2, 0]]
    assert reply.headers["VLM-Resolved"] == "vis=36, vis_mean=18.00, method=foveal+fastv, floor=1"
    for headers in ({"VLM-Explain": "why"}, {"VLM-Visual-Split": "3"}, {"VLM-Visual-Method": "foveal;x=1"}):
        assert api.chat([image_part(png)], headers=headers).status_code == 400
