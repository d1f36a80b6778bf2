"""Quality at a budget: exact match on held-out scenes, by kind of question, through a running server.

    python -m bench.quality                        both tiny models x every method x {100, 50, 33, 22, 11, 5.5} %
    python -m bench.quality --resume               ... only the cells that bench/results/quality.json lacks
    python -m bench.quality --timing 5             time and memory of every existing cell, 5 pictures, one client
    python -m bench.quality --table                only the tables and plots, from bench/results/quality.json
    python -m bench.quality --name quality-quarter --ratios 0.25 --scenes 300 --methods divprune visionzip
    python -m bench.quality --prune --name quality-prune --ratios 1 0.5 0.33 0.22 0.11
    python -m bench.quality --accuracy             both tiny models at full budget on 1,000 scenes, in both orders
    python -m bench.quality --accuracy --weights auto int8 int4        ... and with quantized weights
    python -m bench.quality tiny-llava --url http://127.0.0.1:8000

At full budget every method is the identity (tests/cpu/engine/reduce/test_contract.py). So 100 % is measured once and
shown in each row, and `none` refuses smaller budgets. The oracle row keeps the cells that hold something
(bench/reducers/oracle.py). Only a server that the bench starts has this method, not a server given by --url. Accuracy
does not depend on the load of the machine. Times do, so times are a run of their own. --resume keeps cells of the same
questions, weights and method. After a change of code that several methods share, run without --resume. The budget of a
method inside the decoder is the mean over the layers. In a method's text `{enter}` stands for 1.5 times the budget.
"""

import argparse
import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import httpx

from bench.quality.cells import Answer, Cell, Kept, as_json, code_of, models, score
from bench.quality.reported import reported_table
from bench.quality.table import accuracy_section, sections
from bench.quality.times import measure_times
from bench.report import RESULTS, Json, provenance, write
from bench.scenes import MODELS, Item, body, held_out
from bench.server import Server, serving

RATIOS = (1.0, 0.5, 0.33, 0.22, 0.11, 0.055)
COMPOSITIONS = (
    "pixelprune+divprune", "pixelprune+visionzip", "evit;keep=0.5+divprune", "visionzip;keep=0.5+divprune",
    "pixelprune+foveal", "evit;keep=0.5+foveal",
)  # fmt: skip
EARLIER = ("holitom;k=1",)  # layer 18 of 28, the default, is layer 3 of 4, too deep for half of the tokens
CONCURRENCY = 8
MAX_TOKENS = 80
REDUCERS = Path(__file__).parents[1] / "reducers"


class Refused(RuntimeError):
    """The server refuses the method for this model. The message is the server's."""


async def ask(server: Server, items: Sequence[Item], method: str, ratio: float) -> list[Answer]:
    """Ask all of `items`, CONCURRENCY at a time. Questions about one picture stay together.

    Raises:
        Refused: the first answer is a 400.
        RuntimeError: another request fails.
    """
    answers: list[Answer] = []

    async def worker(client: httpx.AsyncClient, queue: Iterator[Item]) -> None:
        for item in queue:  # shared: each item goes to one worker
            request = body(server.model, item, MAX_TOKENS, method, ratio)
            reply = await client.post(f"{server.url}/v1/chat/completions", json=request)
            if reply.status_code == 400 and not answers:
                raise Refused(reply.json()["error"]["message"])
            if reply.status_code != 200:
                raise RuntimeError(f"{method} at {ratio:.0%}: {reply.status_code} {reply.text[:500]}")
            data = reply.json()
            visual = data["usage"]["vlm"]["visual"]
            text = data["choices"][0]["message"]["content"] or ""
            answers.append(Answer(item, text, visual["offered"], visual["kept_mean"]))

    async with httpx.AsyncClient(timeout=120.0, trust_env=False) as client:
        await worker(client, iter(items[:1]))
        rest = iter(items[1:])
        async with asyncio.TaskGroup() as group:
            for _ in range(CONCURRENCY):
                group.create_task(worker(client, rest))
    return answers


def methods(server: Server, *, prune: bool) -> list[str]:
    """The reducers of the server, or the pruners inside the decoder, alone and behind the default reducer."""
    reply = httpx.get(f"{server.url}/v1/vlm/methods", timeout=10.0, trust_env=False)
    reply.raise_for_status()
    inside = sorted(entry["name"] for entry in reply.json()["data"] if entry["stage"] == "decoder")
    if prune:
        inside = sorted([*inside, *EARLIER])
        return [*inside, *(f"{reply.json()['default']};keep={{enter}}+{name}" for name in inside)]
    return sorted(entry["name"] for entry in reply.json()["data"] if entry["name"] not in inside)


class Run:
    """One run over some models: its questions, and the place of its results."""

    def __init__(
        self, items: Sequence[Item], ratios: Sequence[float], chosen: Sequence[str], kept: Kept, *, prune: bool
    ) -> None:
        self._items, self._ratios, self._chosen, self._kept = items, ratios, list(chosen), kept
        self._prune = prune
        self._n_scenes = len({item.scene.seed for item in items})

    def _cell(self, server: Server, model: str, method: str, ratio: float) -> Cell:
        code = code_of(model, method, self._n_scenes)
        if cell := self._kept.find(model, method, ratio, code):
            return cell
        cell = replace(score(model, method, ratio, asyncio.run(ask(server, self._items, method, ratio))), code=code)
        print(f"{model} {method} {ratio:.1%}: {cell.share():.1f} %", flush=True)
        self._kept.put(cell)
        return cell

    def model(self, server: Server, model: str) -> None:
        """Score every cell of one model's table that the server can serve, or the cells of the chosen methods."""
        full = self._cell(server, model, "none", 1.0)
        wanted = self._chosen or [name for name in methods(server, prune=self._prune) if name != "none"]
        wanted += [] if self._chosen or self._prune else COMPOSITIONS
        for method in wanted:
            try:
                for ratio in self._ratios:
                    if ratio < 1.0:
                        self._cell(server, model, method, ratio)
            except Refused as refusal:
                print(f"{model} {method}: {refusal}", flush=True)
                continue
            if 1.0 in self._ratios:
                self._kept.put(replace(full, method=method, code=code_of(model, method, self._n_scenes), times=None))


def accuracy(args: argparse.Namespace) -> None:
    """Full budget alone, by model, form of the weights, and order of question and picture."""
    made_by, items, cells = provenance("bench.quality"), held_out(args.scenes or 1000), []
    for model, weights in product(args.models, args.weights):
        with serving(model, [f"model.weights={weights}"], url=args.url) as server:
            for order in ("picture first", "text first"):
                asked = [replace(item, text_first=order == "text first") for item in items]
                cell = score(model, "none", 1.0, asyncio.run(ask(server, asked, "none", 1.0)))
                cells.append(replace(cell, weights=weights, order=order))
    name, title = ("accuracy", "Accuracy at full budget")
    if args.weights != ["auto"]:
        name, title = "weights", "Accuracy by the form of the weights"
    write(name, title, made_by, [as_json(cell) for cell in cells], [accuracy_section(cells)])


def budgets(args: argparse.Namespace) -> None:
    """Methods by budgets: score, or time, or draw the tables again."""
    made_by = provenance("bench.quality")
    if args.timing:
        made_by = {"timing": f"{made_by['command']}, {made_by['date']}, load_1m {made_by['load_1m']}"}
    kept = Kept(args.name, {} if args.table else made_by, resume=args.resume or args.table or bool(args.timing))
    if args.timing:
        measure_times(kept, args.models, args.timing, REDUCERS)
    elif not args.table:
        run = Run(held_out(args.scenes or 100), args.ratios, args.methods, kept, prune=args.prune)
        for model in args.models:
            with serving(model, url=args.url, reducers=REDUCERS) as server:
                run.model(server, model)
    found = [section for model in models(kept.cells) for section in sections(model, kept.of(model), RESULTS, args.name)]
    if args.name == "quality":
        found += ["## Beside the papers", reported_table({model: kept.of(model) for model in models(kept.cells)})]
    ordered: list[Json] = [as_json(cell) for model in models(kept.cells) for cell in kept.of(model)]
    write(args.name, "Quality at a budget", kept.made_by, ordered, found)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=list(MODELS), help="bundled names or directories")
    parser.add_argument("--scenes", type=int, help="held-out scenes (default: 100; 1,000 with --accuracy)")
    parser.add_argument("--accuracy", action="store_true", help="full budget only")
    parser.add_argument("--methods", nargs="+", default=[], help="only these, beside `none`")
    parser.add_argument("--prune", action="store_true", help="what acts inside the decoder, alone and behind a reducer")
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS), help="shares that are kept")
    parser.add_argument("--name", default="quality", help="of the files in bench/results")
    parser.add_argument("--resume", action="store_true", help="keep the cells that are there")
    parser.add_argument("--timing", type=int, default=0, metavar="N", help="time the cells that are there, N pictures")
    parser.add_argument("--table", action="store_true", help="write the tables of what is there again")
    parser.add_argument("--weights", nargs="+", default=["auto"], help="values of model.weights, with --accuracy")
    parser.add_argument("--url", help="a server that runs already; give one model")
    args = parser.parse_args()
    if args.url and len(args.models) != 1:
        parser.error("--url serves one model: name it")
    if args.weights != ["auto"] and not args.accuracy:
        parser.error("--weights goes with --accuracy")
    accuracy(args) if args.accuracy else budgets(args)


if __name__ == "__main__":
    main()
