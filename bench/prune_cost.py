"""Cost and gain of pruning inside the decoder: prefill time, KV bytes and decode time of the random model.

    python -m bench.prune_cost                     the LLaVA-shaped model, every method, a mean of 22 % per layer
    python -m bench.prune_cost --mean 0.5 --methods fastv horizon

The engine runs in this process and answers one request at a time. The picture's features are cached, so a first step is
reduction and prefill alone. Each round runs all methods and the dense prompt in turn. The table compares medians.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from statistics import median

import torch

import foveate.engine.prune.methods as family
from bench.random_model.checkpoint import add_arguments, loaded
from bench.report import Json, provenance, table, write
from foveate.configs.load import load as load_config
from foveate.engine.common import Accepted, Delta, Failed, Generate, Image, SamplingParams, Stage, VisualBudget, names
from foveate.engine.engine import Engine
from foveate.engine.models.base import Model
from foveate.engine.pruning import Pruning

SIDE = 336
N_TEXT = 27  # beside 576 visual tokens: 603, as in bench.peers
N_OUTPUT = 16


@dataclass(frozen=True)
class Row:
    method: str  # "" is the dense prompt
    mean: float  # visual tokens per layer
    prefill_s: float
    select_s: float  # of that, at the pruning points
    decode_s: float  # a token
    kv_bytes: int  # of the whole prompt
    refused: str = ""


class Bench:
    """One engine and one picture."""

    def __init__(self, model: Model, settings: list[str]) -> None:
        config = load_config(None, ["cache.prefix_sharing=false", "scheduler.chunk_tokens=2048", *settings])
        self.engine = Engine(model, config)
        self.model = model
        noise = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (SIDE, SIDE, 3), generator=noise, dtype=torch.uint8).numpy().tobytes()
        self.image = Image(pixels=pixels, height=SIDE, width=SIDE, digest=sha256(pixels).digest())
        self.select_s = 0.0
        cross = Pruning.cross

        def timed(pruning: Pruning, *args: object) -> object:
            started = time.perf_counter()
            result = cross(pruning, *args)  # type: ignore[arg-type]
            self.select_s += time.perf_counter() - started
            return result

        Pruning.cross = timed  # type: ignore[method-assign,assignment]

    def ask(self, method: str, mean: float) -> Row:
        """Answer one request. The first request of an engine also encodes the picture, so its row must not be used."""
        prune = Stage(method=method) if method else None
        visual = VisualBudget(method="none", prune=prune, ratio=mean if method else 1.0)
        before, after = N_TEXT // 2, N_TEXT - N_TEXT // 2
        generate = Generate(
            id="r",
            prompt_ids=[300] * before + [self.model.spec.image_token_id] + [301] * after,
            images=[self.image],
            visual=visual,
            sampling=SamplingParams(temperature=0.0, max_tokens=N_OUTPUT, ignore_eos=True),
        )
        self.engine.add(generate)
        kept, prompt = 0.0, 0
        for event in self.engine.take_events():
            if isinstance(event, Failed):
                return Row(method, 0.0, 0.0, 0.0, 0.0, 0, event.message)
            if isinstance(event, Accepted):
                kept, prompt = event.visual.mean, event.prompt_tokens - event.visual.kept
        self.select_s = 0.0
        started = time.perf_counter()
        self.engine.step()
        prefill_s, select_s = time.perf_counter() - started, self.select_s
        pool, kv = self.engine._space.pool, self.engine._kv
        held = pool.n_used * kv.page_bytes
        started, n = time.perf_counter(), 0
        while self.engine.has_work:
            n += sum(isinstance(event, Delta) for event in self.engine.step())
        decode_s = (time.perf_counter() - started) / n
        assert prompt == N_TEXT, "the prompt is the one described"
        return Row(method, kept, prefill_s, select_s, decode_s, held)


def measure(bench: Bench, methods: list[str], mean: float, rounds: int) -> Iterator[Row]:
    """Medians over rounds. The dense prompt comes first."""
    bench.ask("", 1.0)
    found: dict[str, list[Row]] = {method: [] for method in ["", *methods]}
    for _ in range(rounds):
        for method, rows in found.items():
            rows.append(bench.ask(method, mean))
    for method, rows in found.items():
        times = {key: median(getattr(row, key) for row in rows) for key in ("prefill_s", "select_s", "decode_s")}
        yield Row(method, rows[0].mean, **times, kv_bytes=rows[0].kv_bytes, refused=rows[0].refused)


def section(rows: list[Row]) -> str:
    dense = rows[0]
    lines = []
    for row in rows:
        if row.refused:
            continue
        lines.append([
            row.method or "dense", f"{row.mean:.0f}", f"{1e3 * row.prefill_s:.0f}",
            f"{row.prefill_s / dense.prefill_s:.2f}", f"{1e3 * row.select_s:.1f}",
            f"{row.kv_bytes / 2**20:.1f}", f"{row.kv_bytes / dense.kv_bytes:.2f}",
            f"{1e3 * row.decode_s:.1f}", f"{row.decode_s / dense.decode_s:.2f}",
        ])  # fmt: skip
    refused = "\n".join(f"{row.method}: refused, {row.refused}" for row in rows if row.refused)
    header = ["method", "visual tokens a layer", "prefill ms", "of dense", "at the points, ms"]
    return table([*header, "KV MiB", "of dense", "ms a token", "of dense"], lines) + (
        "\n\n" + refused if refused else ""
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mean", type=float, default=0.22, help="share of the visual tokens in a layer, on average")
    parser.add_argument("--methods", nargs="+", default=names(family))
    parser.add_argument("--rounds", type=int, default=5)
    add_arguments(parser)
    args = parser.parse_args()
    made_by = provenance("bench.prune_cost")
    model = loaded(args)
    rows = list(measure(Bench(model, args.set), args.methods, args.mean, args.rounds))
    said = (
        f"{args.family}, weights {model.weights}, KV {model.dtype}: {rows[0].mean:.0f} visual tokens and {N_TEXT} of "
        f"text, medians of {args.rounds}. A method's own schedule is scaled down to a mean of {args.mean:.0%}; one "
        "that holds less by itself stays as it is."
    )
    results: Json = [asdict(row) for row in rows]
    write("prune_cost", "Pruning inside the decoder: what it costs and saves", made_by, results, [said, section(rows)])


if __name__ == "__main__":
    main()
