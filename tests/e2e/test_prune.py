"""Pruning inside the decoder as users meet it: one header, what it costs shown, many plans at once."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

import foveate.engine.prune.methods as family
from foveate.engine.common import names


def ask(server: str, model: str, url: str, method: str | None, **more: object) -> httpx.Response:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Describe the picture."}]
    request = {"model": model, "messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 24}
    headers = {} if method is None else {"VLM-Visual-Method": method}
    return httpx.post(f"{server}/v1/chat/completions", json=request | more, headers=headers, timeout=60.0)


def visual(reply: httpx.Response) -> dict[str, Any]:
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()["usage"]["vlm"]["visual"]
    return found


def test_one_header_prunes_and_the_answer_says_what_it_spent(
    server: str, model: str, picture: Callable[[int], str]
) -> None:
    dense = ask(server, model, picture(1), None)
    pruned = ask(server, model, picture(1), "fastv;k=1;r=0.5")
    n, spent = visual(dense)["offered"], visual(pruned)
    assert spent["kept"] == n and spent["by_layer"] == [[0, n], [1, n // 2]] and spent["method"] == "fastv"
    assert spent["kept_mean"] == pytest.approx((n + 3 * (n // 2)) / 4, abs=0.01)
    assert f"vis_mean={spent['kept_mean']:.2f}" in pruned.headers["VLM-Resolved"]
    peaks = [reply.json()["usage"]["vlm"]["kv"]["peak_tokens"] for reply in (dense, pruned)]
    assert peaks[0] - peaks[1] >= n * 3 // 8 - 4, "less is held in the cache, too"
    assert len(pruned.json()["choices"][0]["message"]["content"]) > 10


def test_behind_a_reducer_the_budget_is_the_mean_over_layers(
    server: str, model: str, picture: Callable[[int], str]
) -> None:
    reply = ask(
        server, model, picture(2), "divprune;keep=0.5+fastv;k=1", vlm={"visual": {"ratio": 0.25}, "explain": "kept_map"}
    )
    spent = visual(reply)
    assert spent["kept"] == round(0.5 * spent["offered"])
    assert spent["kept_mean"] == pytest.approx(0.25 * spent["offered"], abs=1)
    assert sum(spent["per_image"][0]["kept_map"][1::2]) == spent["kept"]


def test_every_method_answers_at_once_in_one_batch(server: str, model: str, picture: Callable[[int], str]) -> None:
    methods = [*names(family), *(f"divprune;keep=0.6+{name}" for name in names(family))]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda method: ask(server, model, picture(3), method, max_tokens=4), methods))
    for method, reply in zip(methods, replies, strict=True):
        assert visual(reply)["kept_mean"] < visual(reply)["kept"], method


@pytest.mark.parametrize(
    ("method", "ratio", "says"),
    [
        ("fastv;k=9", None, "layers: 9 is not in 1..3"),
        ("fastv;q=1", None, "no setting 'q'"),
        ("fastv+divprune", None, "comes before fastv"),
        ("fastv+horizon", None, "both act inside the decoder"),
        ("fastv;k=2", 0.1, "is below the 0.5 that the layers before the first point"),
    ],
)
def test_mistakes_are_named(
    server: str, model: str, picture: Callable[[int], str], method: str, ratio: float | None, says: str
) -> None:
    more = {} if ratio is None else {"vlm": {"visual": {"ratio": ratio}}}
    reply = ask(server, model, picture(0), method, **more)
    assert reply.status_code == 400 and says in reply.json()["error"]["message"], reply.text
