"""CPU time of a decode step besides the model: 8 sequences on a tiny model, engine and server process.

    python -m bench.host                       tiny-llava, greedy and sampled; writes results/host.{json,md}
    python -m bench.host tiny-qwen2-vl --steps 400

Engine: a real engine runs in this process. The bench counts the CPU time of its thread by phase. The time of a phase
excludes the phases that it calls. The forward pass of the model (with attention and the cache's store) is no overhead
and has its own row. "IPC" encodes a step's events and hands the events to a real socket. Server: a real server runs
beside 8 streaming HTTP clients, which have a process of their own. The bench counts the CPU time of the server process,
all threads, over the steps in which all eight streams run. So the figure holds the work of a step, not of a request.
The overhead of a step is the sum of both.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import psutil
import torch
import zmq

import foveate.engine.engine as engine_module
from bench.host.clients import Window, stream_all
from bench.report import Json, provenance, table, write
from foveate.configs.config import Config, ModelConfig
from foveate.engine.common import Generate, SamplingParams
from foveate.engine.engine import Engine
from foveate.engine.process import Channel, load
from foveate.engine.sampler import sample
from foveate.kernels.cpu.levels import extension, level
from foveate.kernels.draw import Law, draw
from foveate.kernels.largest import largest
from foveate.server.find_model import find_model
from foveate.server.launch import launched

N_SEQUENCES = 8
PROMPT_TOKENS = 96
LIMIT_MS = 1.5
POLICIES = ("passive", "active")  # of torch's threads; the engine process sets the first
LAWS = {"greedy": SamplingParams(temperature=0.0), "sampled": SamplingParams(temperature=0.7, top_p=0.9)}
MODEL_PHASE = "model"
VOCABULARY = 152_064


class Clock:
    """CPU seconds of this thread by phase. A phase excludes the phases within it."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._inner.append(0.0)
        started = time.thread_time()
        try:
            yield
        finally:
            elapsed = time.thread_time() - started
            self.seconds[name] += elapsed - self._inner.pop()
            if self._inner:
                self._inner[-1] += elapsed

    def wrap(self, owner: object, method: str, name: str) -> None:
        """Count every call of `owner.method` as a phase."""
        call: Callable[..., object] = getattr(owner, method)

        def timed(*args: object, **kwargs: object) -> object:
            with self.phase(name):
                return call(*args, **kwargs)

        setattr(owner, method, timed)


@contextmanager
def _channel() -> Iterator[Channel]:
    """A channel whose other end is bound and never read."""
    with tempfile.TemporaryDirectory() as folder, zmq.Context() as context:
        ends = [context.socket(zmq.PUSH), context.socket(zmq.PULL)]
        for socket, name in zip(ends, ("to_engine", "from_engine"), strict=True):
            socket.set_hwm(0)
            socket.bind(f"ipc://{folder}/{name}")
        channel = Channel.connect(Path(folder))
        yield channel
        channel.close()
        for socket in ends:
            socket.close(linger=0)


def engine_phases(config: Config, sampling: SamplingParams, n_steps: int) -> dict[str, float]:
    """Microseconds per decode step of N_SEQUENCES sequences, by phase."""
    model = load(config)
    engine, clock = Engine(model, config), Clock()
    engine.warm_up()
    clock.wrap(engine, "step", "rest of the step")
    for part, method, name in (
        (engine._scheduler, "schedule", "schedule"),
        (engine._encoder, "run", "schedule"),
        (engine._runner, "run", "build the batch"),
        (engine, "_commit", "commit"),
        (engine, "_emit", "emit"),
    ):
        clock.wrap(part, method, name)
    for method in ("embed", "rotary", "run", "logits"):
        clock.wrap(model, method, MODEL_PHASE)
    clock.wrap(engine_module, "sample", "sample")
    try:
        for i in range(N_SEQUENCES):
            tokens = [20 + (i + j) % 50 for j in range(PROMPT_TOKENS)]  # plain words: special tokens come first
            rule = SamplingParams(
                temperature=sampling.temperature, top_p=sampling.top_p, seed=i, max_tokens=n_steps + 40, ignore_eos=True
            )
            engine.add(Generate(id=f"chatcmpl-{i:032x}", prompt_ids=tokens, sampling=rule))
        for _ in range(20):
            engine.step()
        clock.seconds.clear()
        with _channel() as channel:
            for _ in range(n_steps):
                events = engine.step()
                with clock.phase("IPC"):
                    list(channel.receive(0.0))
                    channel.send(events)
    finally:
        engine_module.__dict__["sample"] = sample
    return {name: 1e6 * seconds / n_steps for name, seconds in clock.seconds.items()}


def _cpu_s(pid: int) -> float:
    """CPU seconds of a process, all threads, by the scheduler's own clock."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


@dataclass(frozen=True)
class Serving:
    """Microseconds per step while N_SEQUENCES clients stream."""

    server_us: float  # CPU of the server process
    engine_us: float  # CPU of the engine process, the model included
    wall_us: float
    n_steps: float


def serving(model: str, sampling: SamplingParams, n_steps: int) -> Serving:
    """Start a server, stream N_SEQUENCES answers of `n_steps` tokens, and count CPU time while all streams run."""
    context = multiprocessing.get_context("spawn")
    with launched(model) as server:
        (engine,) = psutil.Process(server.pid).children()
        ours, theirs = context.Pipe()
        work = Window(server.url, model, N_SEQUENCES, n_steps, sampling.temperature, sampling.top_p)
        clients = context.Process(target=stream_all, args=(work, theirs))
        clients.start()
        marks: list[tuple[float, float, float, int]] = []
        for _ in range(2):
            n_events: int = ours.recv()
            marks.append((_cpu_s(server.pid), _cpu_s(engine.pid), time.perf_counter(), n_events))
        n_all: int = ours.recv()
        clients.join()
        if clients.exitcode:
            raise RuntimeError("the clients failed")
    n = (marks[1][3] - marks[0][3]) / n_all * n_steps  # not every token has text, hence an event
    server_s, engine_s, wall_s = (marks[1][i] - marks[0][i] for i in range(3))
    return Serving(1e6 * server_s / n, 1e6 * engine_s / n, 1e6 * wall_s / n, n)


def _best_ms(call: Callable[[], object], n: int = 20) -> float:
    times = []
    for _ in range(n):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1e3 * median(times)


def large_vocabulary() -> dict[str, float]:
    """Milliseconds to sample N_SEQUENCES rows of VOCABULARY scores, by the sampling settings of the rows."""
    random = torch.Generator().manual_seed(0)
    found: dict[str, float] = {}
    for shape, spread in (("peaked", 3.0), ("flat", 1.0)):
        rows = list((torch.randn(N_SEQUENCES, VOCABULARY, generator=random) * spread).unbind())
        found[f"{shape}, greedy"] = _best_ms(partial(largest, rows))
        for name, top_k, top_p in (("temperature", 0, 1.0), ("top-p 0.9", 0, 0.9), ("top-k 50", 50, 1.0)):
            laws = [Law(0.7, top_k, top_p, 0.0, (i, 2, 3)) for i in range(len(rows))]
            found[f"{shape}, {name}"] = _best_ms(partial(draw, rows, laws))
    return found


def two_pools() -> dict[str, float]:
    """Milliseconds of a product by torch and of a norm by our kernels, each alone and in turns.

    Two pools that spin against each other take longer in turns than the sum.
    """
    if level() == "reference":
        return {}
    module = extension()
    a, b = torch.randn(64, 1024), torch.randn(1024, 1024)
    x, weight, out = torch.randn(512, 1024), torch.randn(1024), torch.empty(512, 1024)

    def product() -> None:
        torch.mm(a, b)

    def norm() -> None:
        module.rms_norm(x.data_ptr(), 1024, weight.data_ptr(), out.data_ptr(), 512, 1024, 1e-6)

    def turns() -> None:
        product()
        norm()

    found = {"torch alone": _best_ms(product, 200), "ours alone": _best_ms(norm, 200)}
    return found | {"in turns": _best_ms(turns, 200)}


def two_pools_where(policy: str) -> dict[str, float]:
    """`two_pools` in a new process with this OpenMP wait policy: OpenMP reads the policy at its start."""
    program = "import json; from bench.host.__main__ import two_pools; print(json.dumps(two_pools()))"
    environment = os.environ | {"OMP_WAIT_POLICY": policy}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
    found: dict[str, float] = json.loads(ran.stdout)
    return found


def _rows(phases: dict[str, dict[str, float]], served: dict[str, Serving]) -> list[list[str]]:
    """The table: phases of the engine, the server, and their sum."""
    names = [name for name in next(iter(phases.values())) if name != MODEL_PHASE]
    rows = [[f"engine: {name}", *(f"{phases[law][name] / 1e3:.3f}" for law in LAWS)] for name in names]
    rows.append(["server process", *(f"{served[law].server_us / 1e3:.3f}" for law in LAWS)])
    totals = [(sum(phases[law][name] for name in names) + served[law].server_us) / 1e3 for law in LAWS]
    rows.append([f"**overhead of a step** (limit {LIMIT_MS})", *(f"**{total:.3f}**" for total in totals)])
    rows.append(["the model, for comparison", *(f"{phases[law][MODEL_PHASE] / 1e3:.3f}" for law in LAWS)])
    rows.append(["a step over HTTP, wall", *(f"{served[law].wall_us / 1e3:.3f}" for law in LAWS)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="tiny-llava", help="a bundled name or a directory")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    made_by = provenance("bench.host")
    config, directory = find_model(Config(model=ModelConfig(path=args.model)))
    n_cores = torch.get_num_threads()
    phases = {name: engine_phases(config, law, args.steps) for name, law in LAWS.items()}
    served = {name: serving(args.model, law, args.steps) for name, law in LAWS.items()}
    torch.set_num_threads(n_cores)  # the engine of a tiny model takes one
    vocabulary = large_vocabulary()
    pool = {f"{name}, torch {policy}": ms for policy in POLICIES for name, ms in two_pools_where(policy).items()}
    results: Json = {
        "engine_us": {name: dict(found) for name, found in phases.items()},
        "serving_us": {name: asdict(found) for name, found in served.items()},
        "large_vocabulary_ms": dict(vocabulary),
        "two_pools_ms": dict(pool),
    }
    sections = [
        f"{args.model}, {N_SEQUENCES} sequences; milliseconds per decode step.",
        table(["phase", *LAWS], _rows(phases, served)),
        f"Sampling {N_SEQUENCES} rows of {VOCABULARY:,} scores, milliseconds, {n_cores} threads:",
        table(["rows", "ms"], [[name, f"{ms:.2f}"] for name, ms in vocabulary.items()]),
        f"Two thread pools: torch and our kernels in turns, milliseconds, {n_cores} threads:",
        table(["operation", "ms"], [[name, f"{ms:.3f}"] for name, ms in pool.items()]),
    ]
    write("host", "Host overhead", made_by, results, sections)


if __name__ == "__main__":
    main()
