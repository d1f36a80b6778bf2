"""Prometheus metrics: our own names, and the `vllm:` names that dashboards, autoscalers and gateways know by default.

Counts of requests and tokens are the server's own and survive a restart of the engine; the state of the engine comes
from its heartbeat. At any moment foveate_requests_received_total = foveate_requests_total + foveate_requests_in_flight.
"""

from collections.abc import Iterable, Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

import foveate
from foveate.engine.common.messages import Heartbeat, ModelInfo

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Outcome = Literal["success", "error", "aborted"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """What the server counts; `render` adds what the engine says of itself."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._registry = CollectorRegistry()
        self._received = self._counter("requests_received", "Requests by route.", ("route",))
        self._finished = self._counter(
            "requests", "Ended requests by outcome, and finish reason or error.", ("outcome", "code")
        )
        for outcome in ("success", "error", "aborted"):
            self._finished.labels(outcome, "")  # so that a rate over each outcome exists from the start
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens read, after reduction.")
        self._cached_tokens = self._counter("cached_tokens", "Prompt tokens found in the prefix cache.")
        self._output_tokens = self._counter("output_tokens", "Tokens generated.")
        self._visual_offered = self._counter("visual_tokens_offered", "Visual tokens an unpruned run would read.")
        self._visual_kept = self._counter("visual_tokens_kept", "Visual tokens the language model read.")
        self._first_token = self._histogram("time_to_first_token_seconds", "From request to first token.", _SECONDS)
        self._token_gap = self._histogram("time_per_output_token_seconds", "Between two tokens.", _GAPS)
        self._latency = self._histogram("request_latency_seconds", "From request to its end.", _SECONDS)

    def received(self, route: str) -> None:
        self._received.labels(route).inc()

    def finished(self, outcome: Outcome, code: str) -> None:
        """Call once for each `received`; `code` is the finish reason of a success, else the error's code."""
        self._finished.labels(outcome, code).inc()

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def token_gap(self, seconds: float) -> None:
        self._token_gap.observe(seconds)

    def latency(self, seconds: float) -> None:
        self._latency.observe(seconds)

    def usage(
        self, prompt_tokens: int, cached_tokens: int, output_tokens: int, visual_offered: int, visual_kept: int
    ) -> None:
        """Add what one request spent, as its `usage` says."""
        self._prompt_tokens.inc(prompt_tokens)
        self._cached_tokens.inc(cached_tokens)
        self._output_tokens.inc(output_tokens)
        self._visual_offered.inc(visual_offered)
        self._visual_kept.inc(visual_kept)

    def render(self, heartbeat: Heartbeat | None, model: ModelInfo | None = None, restarts: int = 0) -> bytes:
        """The exposition in the text format of `CONTENT_TYPE`.

        Args:
            heartbeat: the last one; None before the engine was ready, and then its metrics are absent.
            model: None before the engine was ready.
            restarts: of the engine process.
        """
        own = list(self._registry.collect())
        for family in own:  # a time of creation beside each counter doubles the page, and few read it
            family.samples = [s for s in family.samples if not s.name.endswith("_created")]
        scrape = CollectorRegistry()
        families = [*own, *self._server_state(own, restarts), *self._aliases(own)]
        if heartbeat is not None:
            families += _engine_state(heartbeat) + self._engine_aliases(heartbeat)
        if model is not None:
            families += self._model_info(model)
        scrape.register(_Families(families))
        return generate_latest(scrape)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"foveate_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"foveate_{name}", text, buckets=buckets, registry=self._registry)

    def _server_state(self, own: Iterable[Metric], restarts: int) -> list[Metric]:
        in_flight = _total(own, "foveate_requests_received") - _total(own, "foveate_requests")
        build = GaugeMetricFamily("foveate_build_info", "Always 1.", labels=("version", "model_name"))
        build.add_metric((foveate.__version__, self._model_name), 1)
        return [
            GaugeMetricFamily("foveate_requests_in_flight", "Requests that have not ended.", value=in_flight),
            CounterMetricFamily("foveate_engine_restarts", "Deaths of the engine that were mended.", value=restarts),
            build,
        ]

    def _aliases(self, own: list[Metric]) -> list[Metric]:
        histograms = {
            "vllm:time_to_first_token_seconds": "foveate_time_to_first_token_seconds",
            "vllm:inter_token_latency_seconds": "foveate_time_per_output_token_seconds",
            "vllm:time_per_output_token_seconds": "foveate_time_per_output_token_seconds",
            "vllm:e2e_request_latency_seconds": "foveate_request_latency_seconds",
        }
        counters = {
            "vllm:prompt_tokens": "foveate_prompt_tokens",
            "vllm:generation_tokens": "foveate_output_tokens",
            "vllm:prefix_cache_queries": "foveate_prompt_tokens",
            "vllm:prefix_cache_hits": "foveate_cached_tokens",
        }
        by_name = {m.name: m for m in own}
        families: list[Metric] = [self._same_histogram(name, by_name[ours]) for name, ours in histograms.items()]
        families += [self._family(CounterMetricFamily, name, _total(own, ours)) for name, ours in counters.items()]
        success = CounterMetricFamily("vllm:request_success", _ALIAS, labels=("model_name", "finished_reason"))
        for sample in by_name["foveate_requests"].samples:
            if sample.name.endswith("_total") and sample.labels["outcome"] == "success" and sample.labels["code"]:
                success.add_metric((self._model_name, sample.labels["code"]), sample.value)
        return [*families, success]

    def _engine_aliases(self, heartbeat: Heartbeat) -> list[Metric]:
        return [
            self._family(GaugeMetricFamily, "vllm:num_requests_running", heartbeat.running),
            self._family(GaugeMetricFamily, "vllm:num_requests_waiting", heartbeat.waiting),
            self._family(GaugeMetricFamily, "vllm:kv_cache_usage_perc", _kv_usage(heartbeat)),
            self._family(CounterMetricFamily, "vllm:num_preemptions", heartbeat.preemptions),
        ]

    def _model_info(self, model: ModelInfo) -> list[Metric]:
        labels = ("model_name", "block_size", "num_gpu_blocks")
        cache = GaugeMetricFamily("vllm:cache_config_info", _ALIAS, labels=labels)
        cache.add_metric((self._model_name, str(model.block_tokens), str(model.n_blocks)), 1)
        held = ("family", "dtype", "weights", "kernels", "device")
        info = GaugeMetricFamily("foveate_model_info", "Always 1.", labels=held)
        info.add_metric((model.family, model.dtype, model.weights, model.kernels, model.device), 1)
        return [cache, info]

    def _family(self, kind: type[CounterMetricFamily | GaugeMetricFamily], name: str, value: float) -> Metric:
        family = kind(name, _ALIAS, labels=("model_name",))
        family.add_metric((self._model_name,), value)
        return family

    def _same_histogram(self, name: str, ours: Metric) -> Metric:
        buckets = [(s.labels["le"], s.value) for s in ours.samples if s.name.endswith("_bucket")]
        seconds = next(s.value for s in ours.samples if s.name.endswith("_sum"))
        family = HistogramMetricFamily(name, _ALIAS, labels=("model_name",))
        family.add_metric((self._model_name,), buckets, seconds)
        return family


_ALIAS = "What vLLM exports under this name."


class _Families:
    """A collector of families that are there already."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def _engine_state(heartbeat: Heartbeat) -> list[Metric]:
    blocks = GaugeMetricFamily("foveate_kv_blocks", "Blocks of the KV pool by state.", labels=("state",))
    blocks.add_metric(("free",), heartbeat.free_blocks)
    blocks.add_metric(("cached",), heartbeat.cached_blocks)
    blocks.add_metric(("used",), heartbeat.used_blocks)
    gauges = {
        "running": ("Requests in the batch.", heartbeat.running),
        "waiting": ("Requests in the queue.", heartbeat.waiting),
        "kv_usage_ratio": ("Share of the KV blocks that running requests hold.", _kv_usage(heartbeat)),
        "since_step_seconds": ("Since the last real step of the engine ended.", heartbeat.since_step_s),
    }
    counters = {
        "steps": ("Steps of the engine.", heartbeat.steps),
        "preemptions": ("Requests whose blocks were taken back, to be computed again.", heartbeat.preemptions),
        "images_encoded": ("Images the vision tower ran on.", heartbeat.images_encoded),
        "encoder_hits": ("Images whose features were cached.", heartbeat.encoder_hits),
    }
    families: list[Metric] = [blocks]
    families += [GaugeMetricFamily(f"foveate_{n}", text, value=value) for n, (text, value) in gauges.items()]
    families += [CounterMetricFamily(f"foveate_{n}", text, value=value) for n, (text, value) in counters.items()]
    return families


def _kv_usage(heartbeat: Heartbeat) -> float:
    return heartbeat.used_blocks / max(1, heartbeat.total_blocks)


def _total(families: Iterable[Metric], name: str) -> float:
    return sum(s.value for m in families if m.name == name for s in m.samples if s.name.endswith("_total"))
