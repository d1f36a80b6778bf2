"""What the server tells the person who runs it: the log's form, the progress of loading, the banner, the load."""

import asyncio
import logging
import sys
from collections.abc import Iterator
from typing import TextIO

from foveate.configs.config import BudgetConfig, Config
from foveate.engine.common import Heartbeat, ModelInfo
from foveate.server.common.engine_api import EngineApi

log = logging.getLogger("foveate.server")

LOAD_EVERY_S = 10.0
LOG_FORM = "%(asctime)s %(levelname)s %(name)s: %(message)s"  # the engine process writes the same form
PROGRESS = "progress: "  # begins a line of the engine's stderr: bytes of weights loaded, and all bytes
_BAR_CELLS = 30


def set_up_log(config: Config) -> None:
    """Write the log to stderr, at `server.log_level`."""
    logging.basicConfig(level=config.server.log_level.upper(), format=LOG_FORM)
    logging.getLogger("foveate.request").disabled = not config.server.log_requests
    for name in ("httpx", "httpcore"):  # they log the URLs of pictures, whose queries may be secrets
        logging.getLogger(name).setLevel(logging.WARNING)


class LoadProgress:
    """Shows how much of the weights is loaded: a bar on a terminal, elsewhere a line in the log for each quarter."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = sys.stderr if out is None else out
        self._quarters = 0

    def show(self, line: str) -> None:
        """Show one line of the engine that begins with `PROGRESS`. A line that is cut off shows nothing."""
        done, _, total = line.removeprefix(PROGRESS).partition(" ")
        if not (done.isdecimal() and total.isdecimal() and int(total) > 0):
            return
        share, size = int(done) / int(total), f"{int(total) / 1e6:,.0f} MB"
        if self._out.isatty():
            n = int(_BAR_CELLS * share)
            bar = "#" * n + "." * (_BAR_CELLS - n)
            end = "\n" if share >= 1 else ""
            print(f"\rloading weights [{bar}] {share:4.0%} of {size}", end=end, file=self._out, flush=True)
        elif int(4 * share) > self._quarters:
            self._quarters = int(4 * share)
            log.info("loading weights: %.0f %% of %s", 100 * share, size)


def banner(config: Config, model: ModelInfo) -> Iterator[str]:
    """Yield the lines below the ready line: what the server serves, and how."""
    yield f"  names    {', '.join((config.model.name, *config.model.aliases))}"
    yield f"  weights  {model.weights}, dtype {model.dtype}, {model.n_parameters / 1e6:,.1f} million parameters"
    yield f"  device   {model.device} with {model.kernels} kernels"
    yield f"  context  {model.max_context} tokens"
    tokens = model.n_blocks * model.block_tokens
    yield f"  cache    {model.cache_mb} MB: {tokens} tokens in blocks of {model.block_tokens}"
    yield f"  budget   {_budget(config.budget)}"
    keys = len(config.server.api_keys)
    yield f"  access   {f'{keys} API keys' if keys else 'no API key'}; log level {config.server.log_level}"


async def report_load(engine: EngineApi, every_s: float = LOAD_EVERY_S) -> None:
    """Log the throughput every `every_s` seconds in which the engine had work. Runs until it is cancelled."""
    before = engine.heartbeat
    while True:
        await asyncio.sleep(every_s)
        now = engine.heartbeat
        if engine.state == "ready" and now is not None and before is not None and (line := _load(before, now, every_s)):
            log.info("%s", line)
        before = now


def _load(before: Heartbeat, now: Heartbeat, seconds: float) -> str:
    """Return the line about the time between two heartbeats. Empty if the engine was idle."""
    prompt, output = now.prompt_tokens - before.prompt_tokens, now.output_tokens - before.output_tokens
    if not (prompt or output or now.running or now.waiting):
        return ""
    # A prompt counts at its arrival, its cached tokens when it starts to run, which may be an interval later.
    hits = min(100.0, 100 * (now.cached_tokens - before.cached_tokens) / prompt) if prompt else 0.0
    return (
        f"load: prompt {prompt / seconds:.1f} tokens/s, output {output / seconds:.1f} tokens/s, "
        f"running {now.running}, waiting {now.waiting}, "
        f"KV cache {100 * now.used_blocks / max(1, now.total_blocks):.1f} % used, prefix hits {hits:.1f} %"
    )


def _budget(budget: BudgetConfig) -> str:
    caps = []
    if budget.tokens:
        caps.append(f"{budget.tokens} visual tokens")
    if budget.ratio < 1:
        caps.append(f"{budget.ratio:g} of the offered visual tokens")
    cap = f"; at most {budget.max_tokens} for any request" if budget.max_tokens else ""
    return f"{' and '.join(caps) or 'every visual token'} by default, method {budget.method}{cap}"
