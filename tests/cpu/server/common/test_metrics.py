"""The exposition: parsed back, aliases present, sums equal."""

import importlib.util
import random
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from foveate.server.common import metrics as declared
from foveate.server.common.metrics import Metrics, Row
from foveate.server.common.replies import (
    KvReport,
    PromptDetails,
    SchedulingReport,
    TimeReport,
    UsageReport,
    VisualReport,
    VlmReport,
)

_spec = importlib.util.spec_from_file_location("fake_engine", Path(__file__).parents[1] / "fake_engine.py")
assert _spec is not None and _spec.loader is not None
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parse(body: bytes) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def total(samples: Samples, name: str, **labels: str) -> float:
    return sum(v for (n, have), v in samples.items() if n == name and set(labels.items()) <= set(have))


def spent(prompt: int, cached: int, output: int, offered: int, kept: int) -> UsageReport:
    visual = VisualReport(offered=offered, kept=kept, kept_mean=float(kept), method="foveal", per_image=[])
    return UsageReport(
        prompt_tokens=prompt,
        completion_tokens=output,
        total_tokens=prompt + output,
        prompt_tokens_details=PromptDetails(image_tokens=kept, cached_tokens=cached),
        vlm=VlmReport(
            visual=visual,
            time_ms=TimeReport(queue=0.0, encode=0.0, reduce=0.0, prefill=0.0, decode=0.0),
            sched=SchedulingReport(preemptions=0),
            kv=KvReport(peak_tokens=prompt + output),
        ),
    )


@pytest.mark.parametrize("seed", range(3))
def test_requests_are_the_sum_of_their_outcomes(seed: int) -> None:
    draw = random.Random(seed)
    metrics, started, ended = Metrics("tiny"), 0, {"success": 0, "error": 0, "aborted": 0}
    for _ in range(200):
        if draw.random() < 0.6 or started == sum(ended.values()):
            metrics.received(draw.choice(["/v1/chat/completions", "/v1/completions"]))
            started += 1
        else:
            outcome = draw.choice(["success", "error", "aborted"])
            metrics.finished(outcome, draw.choice(["stop", "length"]) if outcome == "success" else "invalid_image")
            ended[outcome] += 1
        if draw.random() < 0.1:
            samples = parse(metrics.render(None))
            assert total(samples, "foveate_requests_received_total") == started
            assert total(samples, "foveate_requests_in_flight") == started - sum(ended.values())
            for outcome, count in ended.items():
                assert total(samples, "foveate_requests_total", outcome=outcome) == count
            assert total(samples, "vllm:request_success_total") == ended["success"]


def test_aliases_say_the_same_as_our_own() -> None:
    metrics = Metrics("tiny")
    for seconds in (0.02, 0.3, 700.0):
        metrics.first_token(seconds)
        metrics.token_gap(seconds / 10)
        metrics.latency(seconds * 2)
    metrics.usage(spent(100, 40, 20, 144, 36))
    metrics.usage(spent(10, 0, 5, 0, 0))
    metrics.finished("success", "stop")
    samples = parse(metrics.render(fake.BEAT, fake.MODEL, restarts=2))
    tiny = {"model_name": "tiny"}
    for alias, own in {
        "vllm:time_to_first_token_seconds": "foveate_time_to_first_token_seconds",
        "vllm:inter_token_latency_seconds": "foveate_time_per_output_token_seconds",
        "vllm:time_per_output_token_seconds": "foveate_time_per_output_token_seconds",
        "vllm:e2e_request_latency_seconds": "foveate_request_latency_seconds",
    }.items():
        assert total(samples, f"{alias}_count", **tiny) == total(samples, f"{own}_count") == 3
        assert total(samples, f"{alias}_sum", **tiny) == total(samples, f"{own}_sum") > 0
        assert total(samples, f"{alias}_bucket", le="+Inf", **tiny) == 3
        assert total(samples, f"{alias}_bucket") == total(samples, f"{own}_bucket")
    expected = {
        "vllm:num_requests_running": 1, "vllm:num_requests_waiting": 2, "vllm:kv_cache_usage_perc": 0.25,
        "vllm:prompt_tokens_total": 110, "vllm:generation_tokens_total": 25, "vllm:prefix_cache_queries_total": 110,
        "vllm:prefix_cache_hits_total": 40, "vllm:num_preemptions_total": 1,
    }  # fmt: skip
    assert {name: total(samples, name, **tiny) for name in expected} == expected
    assert total(samples, "vllm:cache_config_info", block_size="16", num_gpu_blocks="64", **tiny) == 1
    assert total(samples, "vllm:request_success_total", finished_reason="stop", **tiny) == 1
    own = {
        "foveate_engine_restarts_total": 2, "foveate_steps_total": 10, "foveate_encoder_hits_total": 2,
        "foveate_visual_tokens_offered_total": 144, "foveate_visual_tokens_kept_total": 36, "foveate_kv_blocks": 64,
        "foveate_build_info": 1, "foveate_running": 1, "foveate_kv_usage_ratio": 0.25,
    }  # fmt: skip
    assert {name: total(samples, name) for name in own} == own


def test_before_the_engine_is_ready_its_state_is_absent() -> None:
    samples = parse(Metrics("tiny").render(None))
    assert not any(name.startswith(("foveate_kv", "vllm:num", "vllm:cache")) for name, _ in samples)
    assert total(samples, "foveate_requests_total") == 0 and ("foveate_requests_in_flight", ()) in samples


def test_one_row_is_a_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that reads a request's usage and a row that reads the heartbeat need no other line of the package."""
    rows = (
        Row(
            "foveate_dummy_peaks", "counter", "Dummy.", vllm=("vllm:dummy_peaks",),
            usage=lambda usage: usage.vlm.kv.peak_tokens,
        ),
        Row("foveate_dummy_blocks", "gauge", "Dummy.", vllm=("vllm:dummy",), engine=lambda beat: beat.total_blocks),
    )  # fmt: skip
    monkeypatch.setattr(declared, "TABLE", (*declared.TABLE, *rows))
    metrics = Metrics("tiny")
    before = parse(metrics.render(None))
    assert before["foveate_dummy_peaks_total", ()] == 0 and ("foveate_dummy_blocks", ()) not in before
    metrics.usage(spent(100, 40, 20, 144, 36))
    metrics.usage(spent(10, 0, 5, 0, 0))
    samples, tiny = parse(metrics.render(fake.BEAT)), (("model_name", "tiny"),)
    assert samples["foveate_dummy_peaks_total", ()] == samples["vllm:dummy_peaks_total", tiny] == 135
    assert samples["foveate_dummy_blocks", ()] == samples["vllm:dummy", tiny] == 64


def test_a_metric_has_one_name_and_one_source() -> None:
    names = [name for row in declared.TABLE for name in (row.name, *row.vllm)]
    assert len(set(names)) == len(names)
    with pytest.raises(AssertionError, match="exactly one source"):
        Row("foveate_dummy", "gauge", "Dummy.")
    with pytest.raises(AssertionError, match="without labels"):
        Row("foveate_dummy", "gauge", "Dummy.", usage=lambda usage: usage.total_tokens)
