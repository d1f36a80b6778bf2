"""Latency, throughput and memory over HTTP, streaming, against a server that the bench starts.

    python -m bench.serve                          both tiny models, concurrency 1 and 8, full budget and a quarter
    python -m bench.serve tiny-llava --requests 16

Every request brings a picture that the server has not seen, so no cache helps. Every request asks for exactly
OUTPUT_TOKENS tokens. TTFT is the time from the request to its first piece of text. TPOT is the time between the first
and the last piece, divided by the tokens between both. Both are medians over requests. Memory is the peak resident size
of all processes of the server.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median, quantiles

import httpx

from bench.report import Json, provenance, table, write
from bench.scenes import MODELS, Item, body, held_out
from bench.server import Server, serving
from bench.stream import streamed

CONCURRENCY = (1, 8)
BUDGETS = (("full", "none", 1.0), ("quarter", "foveal", 0.25))
OUTPUT_TOKENS = 48
FIRST_SCENE = 100_000  # away from the scenes of bench.quality


@dataclass(frozen=True)
class Timing:
    """One request."""

    ttft_s: float
    total_s: float
    tpot_s: float
    output_tokens: int
    kept: int


@dataclass(frozen=True)
class Load:
    """One model, concurrency and budget."""

    model: str
    concurrency: int
    budget: str
    n_requests: int
    kept: float  # visual tokens per request, mean
    ttft_s: float
    ttft_p95_s: float
    tpot_s: float
    tpot_p95_s: float
    requests_per_s: float
    output_tokens_per_s: float
    peak_bytes: int | None  # None for a server we did not start


async def stream(client: httpx.AsyncClient, server: Server, item: Item, method: str, ratio: float) -> Timing:
    """Send one request and time its pieces."""
    request = body(server.model, item, OUTPUT_TOKENS, method, ratio)
    request |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    found = await streamed(client, server.url, json.dumps(request).encode(), {})
    return Timing(
        ttft_s=found.pieces_s[0],
        total_s=found.total_s,
        tpot_s=found.per_token_s,
        output_tokens=found.output_tokens,
        kept=found.visual_kept,
    )


async def drive(server: Server, items: Sequence[Item], concurrency: int, method: str, ratio: float) -> list[Timing]:
    """Keep `concurrency` requests in flight until all of `items` are answered."""
    timings: list[Timing] = []
    queue: Iterator[Item] = iter(items)

    async def worker(client: httpx.AsyncClient) -> None:
        for item in queue:  # shared: each item goes to one worker
            timings.append(await stream(client, server, item, method, ratio))

    async with httpx.AsyncClient(timeout=300.0, trust_env=False) as client, asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker(client))
    return timings


def _p95(values: Sequence[float]) -> float:
    return quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]


def summary(model: str, concurrency: int, budget: str, timings: Sequence[Timing], wall_s: float) -> Load:
    return Load(
        model=model,
        concurrency=concurrency,
        budget=budget,
        n_requests=len(timings),
        kept=sum(t.kept for t in timings) / len(timings),
        ttft_s=median(t.ttft_s for t in timings),
        ttft_p95_s=_p95([t.ttft_s for t in timings]),
        tpot_s=median(t.tpot_s for t in timings),
        tpot_p95_s=_p95([t.tpot_s for t in timings]),
        requests_per_s=len(timings) / wall_s,
        output_tokens_per_s=sum(t.output_tokens for t in timings) / wall_s,
        peak_bytes=None,
    )


def measure(server: Server, model: str, n_requests: int) -> list[Load]:
    """Drive every combination of concurrency and budget, each after its own warm-up."""
    loads, first = [], FIRST_SCENE
    for concurrency in CONCURRENCY:
        for budget, method, ratio in BUDGETS:
            items = held_out(concurrency + n_requests, first, kinds=("describe",))
            first += len(items)
            asyncio.run(drive(server, items[:concurrency], concurrency, method, ratio))
            if server.memory is not None:
                server.memory.reset()
            started = time.perf_counter()
            timings = asyncio.run(drive(server, items[concurrency:], concurrency, method, ratio))
            load = summary(model, concurrency, budget, timings, time.perf_counter() - started)
            loads.append(load if server.memory is None else replace(load, peak_bytes=server.memory.peak_bytes))
    return loads


def load_table(loads: Sequence[Load]) -> str:
    header = "model, concurrency, budget, visual tokens, TTFT ms, p95, TPOT ms, p95, requests/s, tokens/s, peak MB"
    rows = [
        [
            load.model,
            str(load.concurrency),
            load.budget,
            f"{load.kept:.0f}",
            f"{1e3 * load.ttft_s:.0f}",
            f"{1e3 * load.ttft_p95_s:.0f}",
            f"{1e3 * load.tpot_s:.1f}",
            f"{1e3 * load.tpot_p95_s:.1f}",
            f"{load.requests_per_s:.2f}",
            f"{load.output_tokens_per_s:.0f}",
            "-" if load.peak_bytes is None else f"{load.peak_bytes / 2**20:.0f}",
        ]
        for load in loads
    ]
    return table(header.split(", "), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help="bundled names or directories")
    parser.add_argument("--requests", type=int, default=40, help="per combination of concurrency and budget")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="a setting of the server")
    parser.add_argument("--url", help="a server that runs already; give one model; its memory is not measured")
    args = parser.parse_args()
    if args.url and len(args.models) != 1:
        parser.error("--url serves one model: name it")
    made_by = provenance("bench.serve")
    loads: list[Load] = []
    ready: dict[str, Json] = {}
    for model in args.models:
        with serving(model, args.set, args.url) as server:
            ready[model] = round(server.ready_s, 2)
            loads += measure(server, model, args.requests)
    lines = "Ready after " + ", ".join(f"{seconds} s ({model})" for model, seconds in ready.items()) + "."
    results: Json = {"ready_s": ready, "loads": [asdict(load) for load in loads]}
    write("serve", "Latency, throughput, memory", made_by, results, [lines, load_table(loads)])


if __name__ == "__main__":
    main()
