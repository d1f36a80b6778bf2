"""Presets of `foveate tune`, served, on scenes that tuning never saw: how often the answer equals the unpruned one.

    foveate tune tiny-llava --scenes 240 && foveate tune tiny-qwen2-vl --scenes 240
    python -m bench.tuned tuned-tiny-llava tuned-tiny-qwen2-vl

A server runs with the preset as written. The bench asks each question twice, greedily: once without a budget in the
request, and once with the method `none`. Equal means equal texts.
"""

import argparse
import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import yaml

from bench.report import Json, provenance, table, write
from bench.scenes import Item, body, held_out
from foveate.server.launch import launched
from foveate.tune.measure import wilson

FIRST_SCENE = 9_100_000  # away from those that tuning, the tables and the tests use
MAX_TOKENS = 64
CONCURRENCY = 8


@dataclass(frozen=True)
class Confirmed:
    """One preset."""

    model: str
    method: str
    ratio: float
    cost: float  # visual token-layers, as a share of the unpruned ones
    same: int
    asked: int
    right: int  # with the preset
    right_unpruned: int


async def _texts(url: str, model: str, items: Sequence[Item], *, pruned: bool) -> list[tuple[str, float]]:
    """Answers in order, and the mean share of visual tokens in a layer."""
    found: list[tuple[str, float]] = [("", 0.0)] * len(items)

    async def worker(client: httpx.AsyncClient, queue: Iterator[tuple[int, Item]]) -> None:
        for i, item in queue:  # shared: each item goes to one worker
            request = body(model, item, MAX_TOKENS, "none", 1.0)
            if pruned:
                del request["vlm"]
            reply = await client.post(f"{url}/v1/chat/completions", json=request)
            if reply.status_code != 200:
                raise RuntimeError(f"{reply.status_code} {reply.text[:500]}")
            data = reply.json()
            visual = data["usage"]["vlm"]["visual"]
            text = data["choices"][0]["message"]["content"] or ""
            found[i] = (text, visual["kept_mean"] / visual["offered"])

    async with httpx.AsyncClient(timeout=120.0, trust_env=False) as client, asyncio.TaskGroup() as group:
        queue = iter(list(enumerate(items)))
        for _ in range(CONCURRENCY):
            group.create_task(worker(client, queue))
    return found


def confirm(folder: Path, items: Sequence[Item]) -> Confirmed:
    """Serve a preset and ask every question twice."""
    preset = yaml.safe_load((folder / "preset.yaml").read_text())
    model, budget = preset["model"]["path"], preset["budget"]
    with launched(model, "--config", str(folder / "preset.yaml")) as server:
        full = asyncio.run(_texts(server.url, model, items, pruned=False))
        own = asyncio.run(_texts(server.url, model, items, pruned=True))
    return Confirmed(
        model=model,
        method=budget["method"],
        ratio=budget["ratio"],
        cost=sum(share for _, share in own) / len(own),
        same=sum(a == b for (a, _), (b, _) in zip(own, full, strict=True)),
        asked=len(items),
        right=sum(text.strip() == item.question.answer for item, (text, _) in zip(items, own, strict=True)),
        right_unpruned=sum(text.strip() == item.question.answer for item, (text, _) in zip(items, full, strict=True)),
    )


def _line(one: Confirmed) -> list[str]:
    low, high = wilson(one.same, one.asked)
    return [
        one.model, f"`{one.method}`", f"{one.ratio:g}", f"{100 * one.cost:.1f}",
        f"{one.same} of {one.asked}", f"{100 * one.same / one.asked:.1f} ({100 * low:.1f}-{100 * high:.1f})",
        f"{100 * one.right / one.asked:.1f}", f"{100 * one.right_unpruned / one.asked:.1f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="what `foveate tune` wrote, for bundled models")
    parser.add_argument("--scenes", type=int, default=150)
    args = parser.parse_args()
    made_by, items = provenance("bench.tuned"), held_out(args.scenes, FIRST_SCENE)
    found = [confirm(folder, items) for folder in args.folders]
    header = ["model", "preset's method", "ratio", "token-layers %", "same answer", "% (95 % interval)"]
    results: Json = [asdict(one) for one in found]
    said = (
        f"{len(items)} questions about {args.scenes} scenes that neither training nor tuning saw, through the server."
    )
    lines = table([*header, "right %", "right unpruned %"], [_line(one) for one in found])
    own = {folder: json.loads((folder / "report.json").read_text())["confirmed"] for folder in args.folders}
    held = [f"{folder}: {100 * part['same'] / part['asked']:.1f} % of {part['asked']}" for folder, part in own.items()]
    told = "On its own held-out part tune had found: " + "; ".join(held) + "."
    write("tuned", "Tuned presets, served", made_by, results, [said, lines, told])


if __name__ == "__main__":
    main()
