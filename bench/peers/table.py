"""Tables of `bench.peers`: ratios beside their bounds, medians, shares of the limits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from bench.limits import Cost, Limits
from bench.report import table

Measure = Literal[
    "ttft_s",
    "tpot_s",
    "encode_s",
    "prefill_s",
    "tokens_per_s",
    "pruned_ttft_s",
    "pruned_tpot_s",
    "pruned_tokens_per_s",
    "text_s",
    "text_prefill_s",
]


@dataclass(frozen=True)
class Variant:
    """A system in one setting."""

    name: str
    kind: Literal["ours", "openvino", "vllm", "transformers"]
    form: str = ""  # of the weights
    hint: str = "default"  # of the inference precision
    settings: tuple[str, ...] = ()  # ours
    batch: bool = False  # whether 8 clients are measured too: the longest part
    pruned: bool = False


@dataclass
class Row:
    """Measurements of a system: a list per measure, with one number per round."""

    variant: Variant
    prompt_tokens: int = 0
    pruned_tokens: int = 0
    peak_bytes: int = 0
    measured: dict[Measure, list[float]] = field(default_factory=dict)

    def add(self, measure: Measure, value: float) -> None:
        self.measured.setdefault(measure, []).append(value)

    def median(self, measure: Measure) -> float | None:
        values = self.measured.get(measure)
        return median(values) if values else None


@dataclass(frozen=True)
class Ratio:
    """A number that should stay on one side of a bound."""

    name: str
    value: float
    bound: float
    at_most: bool

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound


# (what, measure and row over measure and row, bound, whether at most)
_TARGETS: tuple[tuple[str, Measure, str, Measure, str, float, bool], ...] = (
    ("TPOT, ours / OpenVINO fp16", "tpot_s", "ours 16 bit", "tpot_s", "openvino fp16", 0.85, True),
    ("TPOT, ours / vLLM", "tpot_s", "ours 16 bit", "tpot_s", "vllm", 0.50, True),
    ("TPOT, ours / transformers", "tpot_s", "ours 16 bit", "tpot_s", "transformers", 0.50, True),
    ("TPOT, ours int8 / OpenVINO fp16", "tpot_s", "ours int8", "tpot_s", "openvino fp16", 0.55, True),
    ("TPOT, ours int4 / OpenVINO fp16", "tpot_s", "ours int4", "tpot_s", "openvino fp16", 0.42, True),
    ("TTFT, ours / OpenVINO fp16", "ttft_s", "ours 16 bit", "ttft_s", "openvino fp16", 0.72, True),
    ("TTFT, ours / vLLM", "ttft_s", "ours 16 bit", "ttft_s", "vllm", 0.60, True),
    ("TTFT, ours int8 / ours", "ttft_s", "ours int8", "ttft_s", "ours 16 bit", 1.0, True),
    ("TTFT, ours at 64 / OpenVINO at 576", "pruned_ttft_s", "ours 16 bit", "ttft_s", "openvino fp16", 0.42, True),
    ("tok/s of 8, ours / OpenVINO", "tokens_per_s", "ours 16 bit", "tokens_per_s", "openvino fp16", 1.35, False),
    ("tok/s of 8, ours / vLLM", "tokens_per_s", "ours 16 bit", "tokens_per_s", "vllm", 1.9, False),
    (
        "tok/s of 8, ours at 64 / OpenVINO",
        "pruned_tokens_per_s",
        "ours 16 bit",
        "tokens_per_s",
        "openvino fp16",
        2.2,
        False,
    ),
    ("tok/s of 8, ours at 64 / vLLM", "pruned_tokens_per_s", "ours 16 bit", "tokens_per_s", "vllm", 3.0, False),
)


def ratios(rows: Mapping[str, Row]) -> list[Ratio]:
    """The ratios to the peers, if both sides were measured."""
    found = []
    for name, over, ours, under, theirs, bound, at_most in _TARGETS:
        above = rows[ours].median(over) if ours in rows else None
        below = rows[theirs].median(under) if theirs in rows else None
        if above is not None and below is not None:
            found.append(Ratio(name, above / below, bound, at_most))
    return found


def shares(row: Row, limits: Limits, picture: Cost, text: Cost, memory_bytes: float) -> list[Ratio]:
    """How near one of our systems comes to the limits of the machine.

    Args:
        picture, text: cost of the two kinds of prompt.
        memory_bytes: allowance of the weights and the KV pool.
    """
    name, form, found = row.variant.name, row.variant.form, []
    if (tpot_s := row.median("tpot_s")) is not None:
        rate = picture.token_bytes[form] / tpot_s
        found.append(Ratio(f"{name}: bytes per token / read bandwidth", rate / limits.read_bytes, 0.78, False))
    if encode_s := row.median("encode_s"):
        floor_s = picture.tower_flops / limits.best_flops
        found.append(Ratio(f"{name}: tower / its GEMM floor", encode_s / floor_s, 1.25, True))
    if prefill_s := row.median("prefill_s"):
        rate = picture.decoder_flops / prefill_s
        found.append(
            Ratio(f"{name}: decoder on the picture's prompt / GEMM rate", rate / limits.best_flops, 0.75, False)
        )
    if ttft_s := row.median("ttft_s"):
        floor_s = (picture.tower_flops + picture.decoder_flops) / limits.best_flops
        found.append(Ratio(f"{name}: GEMM floor of the prompt / TTFT", floor_s / ttft_s, 0.75, False))
    if text_s := row.median("text_prefill_s") or row.median("text_s"):
        rate = text.decoder_flops / text_s
        found.append(Ratio(f"{name}: 1,000-token text / GEMM rate", rate / limits.best_flops, 0.75, False))
    if row.peak_bytes:
        found.append(Ratio(f"{name}: peak memory / allowance", row.peak_bytes / memory_bytes, 1.0, True))
    return found


def ratio_table(found: Sequence[Ratio]) -> str:
    rows = [
        [r.name, f"{r.value:.2f}", f"{'<=' if r.at_most else '>='} {r.bound:.2f}", "yes" if r.met else "no"]
        for r in found
    ]
    return table(["ratio", "measured", "wanted", "met"], rows)


def _cell(value: float | None, scale: float, form: str) -> str:
    return "-" if value is None else format(scale * value, form)


def median_table(rows: Sequence[Row]) -> str:
    """One line per system, and one more if a smaller visual budget was measured."""
    header = "system, prompt tokens, TTFT s, TPOT ms, tok/s of 8, 1,000 tokens s, tower ms, prefill ms, peak MB"
    lines = []
    for row in rows:
        lines.append(
            [
                row.variant.name,
                str(row.prompt_tokens),
                _cell(row.median("ttft_s"), 1, ".2f"),
                _cell(row.median("tpot_s"), 1e3, ".1f"),
                _cell(row.median("tokens_per_s"), 1, ".1f"),
                _cell(row.median("text_s"), 1, ".2f"),
                _cell(row.median("encode_s") or None, 1e3, ".0f"),
                _cell(row.median("prefill_s") or None, 1e3, ".0f"),
                f"{row.peak_bytes / 2**20:.0f}",
            ]
        )
        if row.variant.pruned and row.median("pruned_ttft_s") is not None:
            ttft, tpot = _cell(row.median("pruned_ttft_s"), 1, ".2f"), _cell(row.median("pruned_tpot_s"), 1e3, ".1f")
            rate = _cell(row.median("pruned_tokens_per_s"), 1, ".1f")
            lines.append([f"{row.variant.name}, budget 64", str(row.pruned_tokens), ttft, tpot, rate, *"-" * 4])
    return table(header.replace("1,000", "1000").split(", "), lines)
