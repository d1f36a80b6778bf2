"""Presets of `foveate tune` on scenes that tuning never saw: how often the answer equals the unpruned one.

    foveate tune tiny-llava && foveate tune tiny-qwen2-vl
    python -m bench.tuned tuned-tiny-llava tuned-tiny-qwen2-vl

A server runs with the preset as written. The bench asks each question twice, greedily: once without a budget in the
request, and once with the method `none`. Equal means equal texts.

    python -m bench.tuned --seeds 10

tunes each bundled model with ten seeds and the command's defaults, each seed on scenes of its own, and asks each preset
500 questions about scenes of its own, on the engine in this process. Equal means equal tokens. A cell is one seed of
one model; cells that are done, and measurements of a stopped cell, are read from the folder `--out`.
"""

import argparse
import asyncio
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import httpx
import msgspec
import yaml

from bench.report import Json, provenance, table, wilson, write
from bench.scenes import MODELS, Item, body, held_out
from foveate.bundled import path as bundled_path
from foveate.bundled.scenes import HELD_OUT_SEED
from foveate.configs.config import Config
from foveate.server.find_model import find_model
from foveate.server.launch import launched
from foveate.tune.asking import Asker
from foveate.tune.command import Options, tune
from foveate.tune.data import scenes

TUNE = Path(__file__).parents[1] / "tune"
FIRST_SCENE = 9_100_000  # away from those that tuning, the tables and the tests use
FIRST_FRESH = 10_000_000  # of --seeds
FRESH, FRESH_SCENES = 500, 100  # pairs of a check, and scenes that have at least so many
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


class Cell(msgspec.Struct, frozen=True):
    """One seed of one model."""

    weights: str  # digest of the model's weights and of `tune/`
    model: str
    seed: int
    wish: float
    method: str
    ratio: float
    cost: float  # visual token-layers, as a share of the unpruned ones
    held_out: tuple[int, int]  # unchanged answers and pairs of tune's own test
    fresh: tuple[int, int]
    seconds: float  # of both; less if a stopped run went on

    @property
    def saves(self) -> bool:
        return self.cost < 1

    @property
    def meets(self) -> bool:
        return self.fresh[0] >= self.wish * self.fresh[1] - 1e-9


def _cell(model: str, seed: int, out: Path) -> Cell:
    """Tune and check, or read what was found before with the same weights and the same `tune/`."""
    digest = hashlib.sha256()
    directory = bundled_path(model)
    assert directory is not None, "the models are bundled"
    for file in [*sorted(directory.glob("*.safetensors")), *sorted(TUNE.glob("*.py"))]:
        digest.update(file.read_bytes())
    weights, folder = digest.hexdigest()[:16], out / f"{model}-{seed}"
    known = folder / "cell.json"
    if known.exists() and (cell := msgspec.json.decode(known.read_bytes(), type=Cell)).weights == weights:
        return cell
    began, base = time.monotonic(), Config()
    config = replace(base, model=replace(base.model, path=model))
    options = Options(config=config, seed=seed, out=folder)
    tune(options)
    report = json.loads((folder / "report.json").read_text())
    own = report["confirmed"]
    asker = Asker(*find_model(config))
    pairs = asker.prepare(scenes(FRESH_SCENES, HELD_OUT_SEED + FIRST_FRESH + FRESH_SCENES * seed)[:FRESH])
    assert len(pairs) == FRESH, "the scenes have questions enough"
    full = asker.ask(pairs, "none", 1.0, options.max_tokens)
    pruned = asker.ask(pairs, own["method"], own["ratio"], options.max_tokens)
    same = sum(a.token_ids == b.token_ids for a, b in zip(full, pruned, strict=True))
    cost = sum(own["layers"]) / len(own["layers"])
    cell = Cell(
        weights, model, seed, options.agreement, own["method"], own["ratio"], cost, (own["same"], own["asked"]),
        (same, FRESH), time.monotonic() - began,
    )  # fmt: skip
    known.write_bytes(msgspec.json.encode(cell))
    return cell


def _seeds(models: Sequence[str], n: int, out: Path) -> None:
    """Run the cells one after the other and write the table."""
    made_by = provenance("bench.tuned")
    cells = [_cell(model, seed, out) for seed in range(n) for model in models]
    cells.sort(key=lambda cell: (cell.model, cell.seed))
    header = ["model", "seed", "preset's method", "ratio", "token-layers %", "held out", "fresh", "meets", "s"]
    rows = [
        [
            c.model, str(c.seed), f"`{c.method}`", f"{c.ratio:g}", f"{100 * c.cost:.1f}",
            f"{c.held_out[0]} of {c.held_out[1]}", f"{c.fresh[0]} of {c.fresh[1]}", "yes" if c.meets else "no",
            f"{c.seconds:.0f}",
        ]
        for c in cells
    ]  # fmt: skip
    said = [_share(model, [c for c in cells if c.model == model]) for model in models]
    told = (
        f"`foveate tune` with its defaults. A preset meets the wish if at least {cells[0].wish:.0%} of {FRESH} answers "
        "about fresh scenes are the unpruned ones. A preset that keeps all tokens cannot miss, so the presets that "
        "save are counted alone."
    )
    write(
        "tuned-seeds",
        "Tuned presets over seeds",
        made_by,
        msgspec.to_builtins(cells),
        [told, *said, table(header, rows)],
    )


def _share(model: str, cells: Sequence[Cell]) -> str:
    saving = [c for c in cells if c.saves]
    mean = sum(c.cost for c in cells) / len(cells)
    same, asked = sum(c.fresh[0] for c in saving), sum(c.fresh[1] for c in saving)
    pooled = f"; {same} of {asked} fresh answers of these are unchanged" if saving else ""
    return (
        f"**{model}**: {sum(c.meets for c in cells)} of {len(cells)} presets meet the wish, and "
        f"{sum(c.meets for c in saving)} of the {len(saving)} that save{pooled}. Mean cost: "
        f"{100 * mean:.1f} % of the token-layers."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="what `foveate tune` wrote, for bundled models")
    parser.add_argument("--scenes", type=int, default=150)
    parser.add_argument("--seeds", type=int, help="tune with so many seeds instead")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="of --seeds")
    parser.add_argument("--out", type=Path, default=Path("tuned-seeds"), help="of --seeds")
    args = parser.parse_args()
    if bool(args.seeds) == bool(args.folders):
        parser.error("give folders, or --seeds")
    if args.seeds:
        _seeds(args.models, args.seeds, args.out)
        return
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
