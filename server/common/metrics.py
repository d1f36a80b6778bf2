"""Prometheus metrics: our own names, and the `vllm:` names that dashboards, autoscalers and gateways know by default.

`TABLE` declares each metric once: name, help text, labels, aliases, and the source of the value. A new counter or gauge
is a new row. The server counts requests and tokens, so these totals survive a restart of the engine. The state of the
engine comes from its heartbeat. At any moment
foveate_requests_received_total = foveate_requests_total + foveate_requests_in_flight.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, Sample

import foveate
from foveate.engine.common import Heartbeat, ModelInfo
from foveate.server.common.replies import UsageReport

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Outcome = Literal["success", "error", "aborted"]
Value = float | Mapping[tuple[str, ...], float]  # one number, or one number for each combination of label values

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_ALIAS = "What vLLM exports under this name."


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerState:
    """The server's own figures at the time of a scrape.

    Attributes:
        restarts: number of restarts of the engine process.
        received: number of requests by route.
        ended: number of ended requests by (outcome, code); see `Metrics.finished`.
    """

    model_name: str
    restarts: int
    received: Mapping[str, int]
    ended: Mapping[tuple[str, str], int]


@dataclass(frozen=True, eq=False)
class Row:
    """The declaration of one metric.

    A counter or a gauge has exactly one source: `usage`, `server`, `engine` or `model`. A histogram has `buckets_s`,
    and a method of `Metrics` observes it.

    Attributes:
        name: as exported, without the `_total` that Prometheus appends to a counter.
        text: the help text.
        labels: names of the labels. The source then returns a mapping whose keys are label values in this order.
        vllm: aliases. An alias has the same samples with one more label, `model_name`.
        usage: what one request adds to the counter.
        server: the value, from the server's own state.
        engine: the value, from the last heartbeat. The metric is absent before the engine is ready.
        model: the value, from the model's name and description. The metric is absent before the engine is ready.
        buckets_s: upper bounds of a histogram's buckets, in seconds.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()
    vllm: tuple[str, ...] = ()
    usage: Callable[[UsageReport], float] | None = None
    server: Callable[[ServerState], Value] | None = None
    engine: Callable[[Heartbeat], Value] | None = None
    model: Callable[[str, ModelInfo], Value] | None = None
    buckets_s: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        sources = [each for each in (self.usage, self.server, self.engine, self.model) if each is not None]
        assert len(sources) == (self.kind != "histogram"), f"{self.name}: a counter or gauge has exactly one source"
        assert bool(self.buckets_s) == (self.kind == "histogram"), f"{self.name}: only a histogram has buckets"
        if self.usage is not None:
            assert self.kind == "counter" and not self.labels, f"{self.name}: usage adds up to a counter without labels"


FIRST_TOKEN = Row(
    "foveate_time_to_first_token_seconds", "histogram", "From request to first token.",
    vllm=("vllm:time_to_first_token_seconds",), buckets_s=_SECONDS,
)  # fmt: skip
TOKEN_GAP = Row(
    "foveate_time_per_output_token_seconds", "histogram", "Between two tokens.",
    vllm=("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"), buckets_s=_GAPS,
)  # fmt: skip
LATENCY = Row(
    "foveate_request_latency_seconds", "histogram", "From request to its end.",
    vllm=("vllm:e2e_request_latency_seconds",), buckets_s=_SECONDS,
)  # fmt: skip

TABLE: tuple[Row, ...] = (
    # requests
    Row(
        "foveate_requests_received", "counter", "Requests by route.", labels=("route",),
        server=lambda state: {(route,): n for route, n in state.received.items()},
    ),
    Row(
        "foveate_requests", "counter", "Ended requests by outcome, and finish reason or error.",
        labels=("outcome", "code"),
        server=lambda state: {(outcome, code): n for (outcome, code), n in state.ended.items()},
    ),
    Row(
        "vllm:request_success", "counter", _ALIAS, labels=("model_name", "finished_reason"),
        server=lambda state: {
            (state.model_name, code): n for (outcome, code), n in state.ended.items() if outcome == "success" and code
        },
    ),
    Row(
        "foveate_requests_in_flight", "gauge", "Requests that have not ended.",
        server=lambda state: sum(state.received.values()) - sum(state.ended.values()),
    ),
    FIRST_TOKEN,
    TOKEN_GAP,
    LATENCY,
    # tokens
    Row(
        "foveate_prompt_tokens", "counter", "Prompt tokens read, after reduction.",
        vllm=("vllm:prompt_tokens", "vllm:prefix_cache_queries"), usage=lambda usage: usage.prompt_tokens,
    ),
    Row(
        "foveate_cached_tokens", "counter", "Prompt tokens found in the prefix cache.",
        vllm=("vllm:prefix_cache_hits",), usage=lambda usage: usage.prompt_tokens_details.cached_tokens,
    ),
    Row(
        "foveate_output_tokens", "counter", "Tokens generated.",
        vllm=("vllm:generation_tokens",), usage=lambda usage: usage.completion_tokens,
    ),
    Row(
        "foveate_visual_tokens_offered", "counter", "Visual tokens an unpruned run would read.",
        usage=lambda usage: usage.vlm.visual.offered,
    ),
    Row(
        "foveate_visual_tokens_kept", "counter", "Visual tokens the language model read.",
        usage=lambda usage: usage.vlm.visual.kept,
    ),
    # the process
    Row(
        "foveate_engine_restarts", "counter", "Deaths of the engine that were mended.",
        server=lambda state: state.restarts,
    ),
    Row(
        "foveate_build_info", "gauge", "Always 1.", labels=("version", "model_name"),
        server=lambda state: {(foveate.__version__, state.model_name): 1},
    ),
    # the engine
    Row(
        "foveate_kv_blocks", "gauge", "Blocks of the KV pool by state.", labels=("state",),
        engine=lambda beat: {
            ("free",): beat.free_blocks, ("cached",): beat.cached_blocks, ("used",): beat.used_blocks
        },
    ),
    Row(
        "foveate_kv_usage_ratio", "gauge", "Share of the KV blocks that running requests hold.",
        vllm=("vllm:kv_cache_usage_perc",), engine=lambda beat: beat.used_blocks / max(1, beat.total_blocks),
    ),
    Row(
        "foveate_running", "gauge", "Requests in the batch.",
        vllm=("vllm:num_requests_running",), engine=lambda beat: beat.running,
    ),
    Row(
        "foveate_waiting", "gauge", "Requests in the queue.",
        vllm=("vllm:num_requests_waiting",), engine=lambda beat: beat.waiting,
    ),
    Row(
        "foveate_since_step_seconds", "gauge", "Since the last real step of the engine ended.",
        engine=lambda beat: beat.since_step_s,
    ),
    Row("foveate_steps", "counter", "Steps of the engine.", engine=lambda beat: beat.steps),
    Row(
        "foveate_preemptions", "counter", "Requests whose blocks were taken back, to be computed again.",
        vllm=("vllm:num_preemptions",), engine=lambda beat: beat.preemptions,
    ),
    Row(
        "foveate_images_encoded", "counter", "Images the vision tower ran on.",
        engine=lambda beat: beat.images_encoded,
    ),
    Row(
        "foveate_encoder_hits", "counter", "Images whose features were cached.",
        engine=lambda beat: beat.encoder_hits,
    ),
    # the model
    Row(
        "vllm:cache_config_info", "gauge", _ALIAS, labels=("model_name", "block_size", "num_gpu_blocks"),
        model=lambda name, info: {(name, str(info.block_tokens), str(info.n_blocks)): 1},
    ),
    Row(
        "foveate_model_info", "gauge", "Always 1.", labels=("family", "dtype", "weights", "kernels", "device"),
        model=lambda _, info: {(info.family, info.dtype, info.weights, info.kernels, info.device): 1},
    ),
)  # fmt: skip


class Metrics:
    """The server's counts. `render` adds the state of the engine."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._received: Counter[str] = Counter()
        # each outcome starts at 0, so that its rate exists from the start
        self._ended: Counter[tuple[str, str]] = Counter({(outcome, ""): 0 for outcome in get_args(Outcome)})
        self._spent = {row: 0.0 for row in TABLE if row.usage is not None}
        self._observed = {
            row: Histogram(row.name, row.text, buckets=row.buckets_s, registry=None)
            for row in TABLE
            if row.kind == "histogram"
        }

    def received(self, route: str) -> None:
        self._received[route] += 1

    def finished(self, outcome: Outcome, code: str) -> None:
        """Call once for each `received`. `code`: finish reason of a success, else the error's code."""
        self._ended[outcome, code] += 1

    def first_token(self, seconds: float) -> None:
        self._observed[FIRST_TOKEN].observe(seconds)

    def token_gap(self, seconds: float) -> None:
        self._observed[TOKEN_GAP].observe(seconds)

    def latency(self, seconds: float) -> None:
        self._observed[LATENCY].observe(seconds)

    def usage(self, usage: UsageReport) -> None:
        """Add the usage of one finished request to every counter that reads it."""
        for row in self._spent:
            if row.usage is not None:
                self._spent[row] += row.usage(usage)

    def render(self, heartbeat: Heartbeat | None, model: ModelInfo | None = None, restarts: int = 0) -> bytes:
        """Return the metrics in the text format of `CONTENT_TYPE`.

        Args:
            heartbeat: last heartbeat; None before the engine is ready: then the engine's metrics are absent.
            model: None before the engine is ready.
            restarts: number of restarts of the engine process.
        """
        server = ServerState(model_name=self._model_name, restarts=restarts, received=self._received, ended=self._ended)
        families: list[Metric] = []
        for row in TABLE:
            if row.kind == "histogram":
                family = _without_created(self._observed[row])
            else:
                value = self._value(row, server, heartbeat, model)
                if value is None:
                    continue
                family = _family(row, value)
            families += [family, *(self._alias(family, name) for name in row.vllm)]
        scrape = CollectorRegistry()
        scrape.register(_Families(families))
        return generate_latest(scrape)

    def _value(
        self, row: Row, server: ServerState, heartbeat: Heartbeat | None, model: ModelInfo | None
    ) -> Value | None:
        """Return None if the row's source does not exist yet."""
        if row.usage is not None:
            return self._spent[row]
        if row.server is not None:
            return row.server(server)
        if row.engine is not None:
            return None if heartbeat is None else row.engine(heartbeat)
        assert row.model is not None, f"{row.name}: a counter or gauge has exactly one source"
        return None if model is None else row.model(self._model_name, model)

    def _alias(self, family: Metric, name: str) -> Metric:
        """Return the samples of `family` under another name, with the label `model_name`."""
        alias = Metric(name, _ALIAS, family.type)
        alias.samples = [
            Sample(name + s.name.removeprefix(family.name), {"model_name": self._model_name, **s.labels}, s.value)
            for s in family.samples
        ]
        return alias


class _Families:
    """A collector of ready-made metric families."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def _family(row: Row, value: Value) -> Metric:
    kind = CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily
    family = kind(row.name, row.text, labels=row.labels)
    for labels, number in (value if isinstance(value, Mapping) else {(): value}).items():
        family.add_metric(labels, number)
    return family


def _without_created(histogram: Histogram) -> Metric:
    """Return the family of a histogram without the `_created` sample, which few readers use."""
    (family,) = histogram.collect()
    family.samples = [s for s in family.samples if not s.name.endswith("_created")]
    return family
