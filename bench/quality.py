"""Quality at a budget: exact match on held-out scenes, by kind of question, through a running server.

    python -m bench.quality                        both tiny models x every method x {100, 50, 33, 22, 11, 5.5} %
    python -m bench.quality --accuracy             both tiny models at full budget on 1,000 scenes
    python -m bench.quality --accuracy --weights auto int8 int4        ... and with quantized weights
    python -m bench.quality tiny-llava --url http://127.0.0.1:8000

Keep-all is the identity for every method (tests/cpu/test_reduce_contract.py), so 100 % is measured once and shown in
each row; `none` refuses smaller budgets. The oracle row keeps the cells that hold something: see
bench/reducers/oracle.py. It needs the server this starts itself; one given by --url has no such method.
"""

import argparse
import asyncio
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import httpx

from bench.report import Json, provenance, table, write
from bench.scenes import Item, body, held_out
from bench.server import Server, serving
from foveate.bundled.scenes import KINDS

MODELS = ("tiny-llava", "tiny-qwen2-vl")
RATIOS = (1.0, 0.5, 0.33, 0.22, 0.11, 0.055)
CONCURRENCY = 8
MAX_TOKENS = 80
REDUCERS = Path(__file__).parent / "reducers"


@dataclass(frozen=True)
class Cell:
    """One model, method and budget, scored."""

    model: str
    method: str
    ratio: float
    offered: float  # visual tokens per picture, mean
    kept: float
    right: dict[str, int]  # by kind
    asked: dict[str, int]
    weights: str = "auto"  # as model.weights was set

    @property
    def overall(self) -> tuple[int, int]:
        return sum(self.right.values()), sum(self.asked.values())


@dataclass(frozen=True)
class Answer:
    item: Item
    text: str
    offered: int
    kept: int

    @property
    def right(self) -> bool:
        return self.text.strip() == self.item.question.answer


def wilson(right: int, asked: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927)."""
    z, p = 1.959964, right / asked
    middle, scale = p + z * z / (2 * asked), 1 + z * z / asked
    spread = z * math.sqrt(p * (1 - p) / asked + z * z / (4 * asked * asked))
    return (middle - spread) / scale, (middle + spread) / scale


def score(model: str, method: str, ratio: float, answers: Sequence[Answer]) -> Cell:
    return Cell(
        model=model,
        method=method,
        ratio=ratio,
        offered=sum(a.offered for a in answers) / len(answers),
        kept=sum(a.kept for a in answers) / len(answers),
        right=dict(Counter(a.item.question.kind for a in answers if a.right)),
        asked=dict(Counter(a.item.question.kind for a in answers)),
    )


async def ask(server: Server, items: Sequence[Item], method: str, ratio: float) -> list[Answer]:
    """Ask all of `items`, CONCURRENCY at a time, those of one picture together."""
    answers: list[Answer] = []
    queue: Iterator[Item] = iter(items)

    async def worker(client: httpx.AsyncClient) -> None:
        for item in queue:  # shared: each item goes to one worker
            request = body(server.model, item, MAX_TOKENS, method, ratio)
            reply = await client.post(f"{server.url}/v1/chat/completions", json=request)
            if reply.status_code != 200:
                raise RuntimeError(f"{method} at {ratio:.0%}: {reply.status_code} {reply.text[:500]}")
            data = reply.json()
            visual = data["usage"]["vlm"]["visual"]
            text = data["choices"][0]["message"]["content"] or ""
            answers.append(Answer(item, text, visual["offered"], visual["kept"]))

    async with httpx.AsyncClient(timeout=120.0, trust_env=False) as client, asyncio.TaskGroup() as group:
        for _ in range(CONCURRENCY):
            group.create_task(worker(client))
    return answers


def methods(server: Server) -> list[str]:
    """The reducers the server has, the reference first."""
    reply = httpx.get(f"{server.url}/v1/vlm/methods", timeout=10.0, trust_env=False)
    reply.raise_for_status()
    found = [entry["name"] for entry in reply.json()["data"]]
    return sorted(found, key=lambda name: (name != "none", name))


async def measure(
    server: Server, model: str, items: Sequence[Item], full_only: bool, chosen: Sequence[str]
) -> list[Cell]:
    """Score every cell of one model's table that a server can serve, or those of the `chosen` methods."""
    cells = [score(model, "none", 1.0, await ask(server, items, "none", 1.0))]
    if full_only:
        return cells
    for method in methods(server)[1:]:
        if chosen and method not in chosen:
            continue
        cells.append(replace(cells[0], method=method))
        for ratio in RATIOS[1:]:
            cells.append(score(model, method, ratio, await ask(server, items, method, ratio)))
            right, asked = cells[-1].overall
            print(f"{model} {method} {ratio:.0%}: {right / asked:.3f}", flush=True)
    return cells


def _share(cell: Cell, kind: str | None) -> str:
    right, asked = cell.overall if kind is None else (cell.right.get(kind, 0), cell.asked.get(kind, 0))
    return f"{100 * right / asked:.1f}" if asked else "-"


def budget_table(cells: Sequence[Cell], kind: str | None) -> str:
    """Rows: methods; columns: budgets; exact match in per cent, overall or of one kind."""
    by_place = {(cell.method, cell.ratio): cell for cell in cells}
    names = list(dict.fromkeys(cell.method for cell in cells))
    rows = [
        [name, *(_share(by_place[name, r], kind) if (name, r) in by_place else "refused" for r in RATIOS)]
        for name in names
    ]
    return table(["method", *(f"{100 * ratio:g} %" for ratio in RATIOS)], rows)


def budget_sections(model: str, cells: Sequence[Cell]) -> list[str]:
    asked = cells[0].overall[1]
    rows: dict[str, list[str]] = {}
    for cell in cells:
        rows.setdefault(cell.method, []).append(f"{cell.kept:.0f}")
    usual = Counter(tuple(row) for row in rows.values() if len(row) == len(RATIOS)).most_common(1)[0][0]
    other = [
        f"{name} {', '.join(row)}" for name, row in rows.items() if len(row) == len(RATIOS) and tuple(row) != usual
    ]
    kept = "; ".join([", ".join(usual), *other])
    half = max(100 * (high - low) / 2 for low, high in (wilson(*cell.overall) for cell in cells))
    lines = f"{asked} questions; mean visual tokens kept: {kept}; 95 % Wilson intervals within +-{half:.1f} points."
    sections = [f"## {model}", lines, "All kinds, exact match in per cent:", budget_table(cells, None)]
    for kind in KINDS:
        sections += [f"{kind}:", budget_table(cells, kind)]
    return sections


def accuracy_section(cells: Sequence[Cell]) -> str:
    rows = []
    for cell in cells:
        for kind in (None, *KINDS):
            right, asked = cell.overall if kind is None else (cell.right.get(kind, 0), cell.asked.get(kind, 0))
            low, high = wilson(right, asked) if asked else (0.0, 1.0)
            share = f"{100 * right / max(asked, 1):.2f}"
            rows.append(
                [cell.model, cell.weights, kind or "overall", str(asked), share, f"{100 * low:.2f} - {100 * high:.2f}"]
            )
    return table(["model", "weights", "kind", "asked", "exact match %", "95 % interval"], rows)


def as_json(cell: Cell) -> dict[str, Json]:
    right, asked = cell.overall
    low, high = wilson(right, asked)
    return {**asdict(cell), "exact_match": right / asked, "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help="bundled names or directories")
    parser.add_argument("--scenes", type=int, help="held-out scenes (default: 100; 1,000 with --accuracy)")
    parser.add_argument("--accuracy", action="store_true", help="full budget only")
    parser.add_argument("--methods", nargs="+", default=[], help="only these, beside `none`")
    parser.add_argument("--weights", nargs="+", default=["auto"], help="values of model.weights, with --accuracy")
    parser.add_argument("--url", help="a server that runs already; give one model")
    args = parser.parse_args()
    if args.url and len(args.models) != 1:
        parser.error("--url serves one model: name it")
    if args.weights != ["auto"] and not args.accuracy:
        parser.error("--weights goes with --accuracy")
    made_by = provenance("bench.quality")
    items = held_out(args.scenes or (1000 if args.accuracy else 100))
    cells: list[Cell] = []
    sections: list[str] = []
    for model, weights in product(args.models, args.weights):
        with serving(model, [f"model.weights={weights}"], url=args.url, reducers=REDUCERS) as server:
            found = asyncio.run(measure(server, model, items, args.accuracy, args.methods))
        cells += [replace(cell, weights=weights) for cell in found]
        sections += [] if args.accuracy else budget_sections(model, found)
    if args.accuracy:
        sections = [accuracy_section(cells)]
    name, title = ("accuracy", "Accuracy at full budget") if args.accuracy else ("quality", "Quality at a budget")
    if args.weights != ["auto"]:
        name, title = "weights", "Accuracy by the form of the weights"
    write(name, title, made_by, [as_json(cell) for cell in cells], sections)


if __name__ == "__main__":
    main()
