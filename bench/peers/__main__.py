"""Foveate beside other servers, interleaved in one run: latency, throughput and memory on the same random model.

    python -m bench.peers                              all systems whose environments exist
    python -m bench.peers --install                    make the missing environments first (.peers/, gigabytes)
    python -m bench.peers --only ours,openvino --quick

Systems: our server and vLLM run over HTTP. OpenVINO GenAI (continuous batching) and transformers `generate` are
libraries in processes of their own. All systems are loaded first. Then each round measures the limits (bench.limits)
and every system once, while SIGSTOP stops the other systems. After a system wakes, it answers one short text that does
not count. The figures are medians over the rounds. All systems get the same requests (bench/peers/work.py): greedy,
exactly 64 tokens, with a picture and a text that no request had before.

    TTFT, TPOT      one client; ours and vLLM over HTTP, the libraries from the call to their stream
    tok/s           8 requests at once, from the first request to the last answer's end; transformers: a static batch
    1,000 tokens    time to the first token of a text of 1,000 tokens
    peak MB         resident memory of all processes of the system, loading included
"""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from bench.limits import (
    Cost,
    Limits,
    cost,
    decoder_weights,
    limits_table,
    llava_cost,
    measure,
    middle,
    native_bfloat16,
    needs_table,
    qwen_cost,
)
from bench.peers.environments import OPENVINO, VLLM, Peers
from bench.peers.systems import Foveate, System, Unavailable, Vllm, Worker, own_python
from bench.peers.table import Measure, Ratio, Row, Variant, median_table, ratio_table, ratios, shares
from bench.peers.work import TEXT_TOKENS, Asks, Batch, Timing
from bench.random_model.checkpoint import n_parameters
from bench.random_model.shape import FAMILIES, Shape
from bench.report import Json, provenance, write

OUTPUT_TOKENS = 64
CLIENTS = 8
PRUNED = 64  # visual tokens
POOL_MB = 256
QUESTION_TOKENS = 27  # of text in the picture's prompt, the chat template's included
COSTS = {"llava": llava_cost, "qwen2_vl": qwen_cost}


_ROUNDED = "model.dtype=bfloat16"  # which holds 16-bit weights as the hardware multiplies them best
VARIANTS = (
    Variant("ours 16 bit", "ours", "bf16" if native_bfloat16() else "int16", "", (_ROUNDED,), batch=True, pruned=True),
    Variant("ours bf16 f32", "ours", "bf16", "f32", ("model.weights=bf16", "model.dtype=float32")),
    Variant("ours int8", "ours", "int8", "", ("model.weights=int8", _ROUNDED)),
    Variant("ours int4", "ours", "int4", "", ("model.weights=int4", _ROUNDED)),
    Variant("openvino fp16", "openvino", "fp16", batch=True),
    Variant("openvino int8", "openvino", "int8"),
    Variant("openvino int8 f32", "openvino", "int8", hint="f32"),
    Variant("vllm", "vllm", batch=True),
    Variant("transformers", "transformers", batch=True),
)


def system(variant: Variant, peers: Peers, family: str) -> System:
    """The system, ready to start. Raises Unavailable if its environment is missing."""
    native = native_bfloat16()
    dtype = "bfloat16" if native else "float32"  # what the checkpoint says, unless this CPU only emulates it
    work = peers.folder / "work"
    model = peers.model(family)
    if variant.kind == "ours":
        return Foveate(model, [*variant.settings, f"cache.memory_mb={POOL_MB}"])
    if variant.kind == "transformers":
        # Qwen2-VL's processor wants torchvision, which is not among our own dependencies.
        python = peers.python(VLLM) if family == "qwen2_vl" else own_python()
        return Worker("transformers", python, model, dtype, family, work)
    if variant.kind == "vllm":
        return Vllm(peers.python(VLLM), model, dtype, work / "vllm.log")
    if variant.hint == "f32" and not native:
        raise Unavailable("f32 is the default on this CPU, which does not multiply bfloat16")
    exported = peers.exported(family, variant.form)
    return Worker("openvino", peers.python(OPENVINO), exported, variant.hint, family, work)


class Run:
    """The systems that could start, and their measurements."""

    def __init__(self, family: str) -> None:
        self.rows: list[Row] = []
        self.skipped: dict[str, str] = {}
        self._family = family
        self.limits: list[Limits] = []
        self._systems: list[tuple[Row, System]] = []
        self._asks = Asks()

    def start(self, variants: Sequence[Variant], peers: Peers, stack: ExitStack) -> None:
        """Start one system after another. Each is stopped before the next one loads. `stack` ends all systems."""
        for variant in variants:
            print(f"starting {variant.name}", flush=True)
            try:
                started = stack.enter_context(system(variant, peers, self._family))
            except Unavailable as why:
                self.skipped[variant.name] = str(why)
                print(f"  skipped: {why}", flush=True)
                continue
            row = Row(variant)
            self.rows.append(row)
            self._systems.append((row, started))
            started.ask([self._asks.about_picture()], 2)  # allocations and compilations that come with first use
            started.freeze()

    def round(self, number: int, with_batch: bool) -> None:
        """Measure every system and the limits once.

        Each round begins with another system, because the speed of the machine changes.
        """
        first = number % max(len(self._systems), 1)
        for row, measured in self._systems[first:] + self._systems[:first]:
            measured.thaw()
            measured.ask([self._asks.about_text(27)], 2)
            self._one_client(row, measured)
            if with_batch and row.variant.batch:
                batch = measured.ask([self._asks.about_picture() for _ in range(CLIENTS)], OUTPUT_TOKENS)
                row.add("tokens_per_s", batch.tokens_per_s)
                if row.variant.pruned:
                    batch = measured.ask([self._asks.about_picture(PRUNED) for _ in range(CLIENTS)], OUTPUT_TOKENS)
                    row.add("pruned_tokens_per_s", batch.tokens_per_s)
            row.peak_bytes = measured.peak_bytes()
            measured.freeze()
            print(f"  {row.variant.name}: {_last(row)}", flush=True)
        self.limits.append(measure(Shape()))

    def _one_client(self, row: Row, measured: System) -> None:
        full = _only(measured.ask([self._asks.about_picture()], OUTPUT_TOKENS))
        text = _only(measured.ask([self._asks.about_text()], 1))
        row.prompt_tokens = full.prompt_tokens
        found: dict[Measure, float] = {
            "ttft_s": full.ttft_s,
            "tpot_s": full.tpot_s,
            "encode_s": full.encode_s,
            "prefill_s": full.prefill_s,
            "text_s": text.ttft_s,
            "text_prefill_s": text.prefill_s,
        }
        if row.variant.pruned:
            pruned = _only(measured.ask([self._asks.about_picture(PRUNED)], OUTPUT_TOKENS))
            row.pruned_tokens = pruned.prompt_tokens
            found |= {"pruned_ttft_s": pruned.ttft_s, "pruned_tpot_s": pruned.tpot_s}
        for name, value in found.items():
            row.add(name, value)


def _only(batch: Batch) -> Timing:
    (timing,) = batch.timings
    return timing


def _last(row: Row) -> str:
    return ", ".join(f"{name} {values[-1]:.4g}" for name, values in row.measured.items() if values[-1])


def allowance_bytes(family: str, need: Cost, form: str) -> float:
    """Weights x 1.25 + KV pool + 300 MB. The size of the weights depends on their form."""
    shape = Shape()
    decoder = decoder_weights(shape) + shape.vocab * shape.hidden
    cached = need.token_bytes["bf16"] - 2 * decoder
    weights = 2 * (n_parameters(family) - decoder) + need.token_bytes[form] - cached
    return 1.25 * weights + (POOL_MB + 300) * 2**20


def sections(run: Run, family: str, found: Limits, rounds: str) -> list[str]:
    """The Markdown, ratios first."""
    text, picture = cost(Shape(), TEXT_TOKENS), COSTS[family](Shape(), QUESTION_TOKENS)
    by_name = {row.variant.name: row for row in run.rows}
    all_ratios: list[Ratio] = ratios(by_name)
    if family != "llava":
        all_ratios = [ratio for ratio in all_ratios if "at 64" not in ratio.name]  # set for a picture of 576 tokens
    for row in run.rows:
        if row.variant.kind == "ours":
            allowed = allowance_bytes(family, picture, row.variant.form)
            all_ratios += shares(row, found, picture, text, allowed)
    parts = [rounds, ratio_table(all_ratios), median_table(run.rows), limits_table(found), needs_table(found, picture)]
    if run.skipped:
        parts.append("Not measured:\n\n" + "\n".join(f"- {name}: {why}" for name, why in run.skipped.items()))
    return parts


def chosen(only: str) -> list[Variant]:
    """The variants whose name begins with a word of a comma-separated list. An empty list names all variants."""
    words = [word.strip() for word in only.split(",") if word.strip()]
    found = [v for v in VARIANTS if not words or any(v.name.startswith(word) for word in words)]
    if not found:
        raise SystemExit(f"--only {only}: there are {', '.join(v.name for v in VARIANTS)}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=FAMILIES, default="llava")
    parser.add_argument("--only", default="", help="names or their beginnings, separated by commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-rounds", type=int, default=5, help="rounds in which 8 clients are measured too")
    parser.add_argument("--quick", action="store_true", help="two rounds, one of them with 8 clients")
    parser.add_argument("--envs", type=Path, default=Path(".peers"), help="the peers' environments and models")
    parser.add_argument("--install", action="store_true", help="make the environments that are missing")
    args = parser.parse_args()
    rounds, with_batch = (2, 1) if args.quick else (args.rounds, args.batch_rounds)
    made_by = provenance("bench.peers")
    run = Run(args.family)
    with ExitStack() as stack:
        run.start(chosen(args.only), Peers(args.envs.resolve(), args.install), stack)
        for i in range(rounds):
            print(f"round {i + 1} of {rounds}", flush=True)
            run.round(i, with_batch=i < with_batch)
    found = middle(run.limits)
    said = f"{args.family}, {n_parameters(args.family) / 1e9:.2f} B parameters, random. Medians of {rounds} rounds"
    said += f" ({with_batch} with 8 clients), every system and every limit once a round, the others stopped meanwhile."
    results: Json = {
        "limits": asdict(found),
        "systems": [asdict(row) for row in run.rows],
        "skipped": dict(run.skipped),
    }
    name = "peers" if args.family == "llava" else f"peers-{args.family.replace('_', '-')}"
    write(name, "Beside the peers", made_by, results, sections(run, args.family, found, said))


if __name__ == "__main__":
    main()
