"""A library as a process that answers one line of JSON with one line: `python -P worker.py KIND DIRECTORY OPTION`.

The interpreter of the environment under test runs this file. So the file imports nothing of Foveate, and imports a
library only in the function that needs it. Times are taken around the library's own streaming. The prompt as text and
the picture as a file exist before the clock starts. Reading and decoding the picture count, as they do for a server.

    request   {"prompts": [text], "pictures": [path or null], "n_tokens": n}
    reply     {"wall_s": s, "answers": [{"ttft_s", "tpot_s", "prompt_tokens", "output_tokens"}]}, or {"error": text}
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, cast

import numpy
from PIL import Image


class Answer(TypedDict):
    ttft_s: float
    tpot_s: float
    prompt_tokens: int
    output_tokens: int


Answerer = Callable[[Sequence[str], Sequence[str | None], int], list[Answer]]


def _answer(started: float, times: Sequence[float], n_prompt: int, n_output: int) -> Answer:
    spread = (times[-1] - times[0]) / max(len(times) - 1, 1)
    return {"ttft_s": times[0] - started, "tpot_s": spread, "prompt_tokens": n_prompt, "output_tokens": n_output}


def transformers_answerer(directory: str, option: str) -> Answerer:
    """`generate` on a static batch; `option` is the dtype."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.generation.streamers import BaseStreamer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[option]
    processor = AutoProcessor.from_pretrained(directory)  # type: ignore[no-untyped-call]
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype)
    generate: Callable[..., torch.Tensor] = cast(Any, model).generate
    model.generation_config.eos_token_id = None  # the length is what is asked for

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: object) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def answer(prompts: Sequence[str], pictures: Sequence[str | None], n_tokens: int) -> list[Answer]:
        started = time.perf_counter()
        images = [Image.open(path).convert("RGB") for path in pictures if path]
        inputs = processor(text=list(prompts), images=images or None, padding=True, return_tensors="pt").to(dtype)
        clock = Clock()
        with torch.inference_mode():
            out = generate(**inputs, max_new_tokens=n_tokens, do_sample=False, pad_token_id=0, streamer=clock)
        n_prompt = inputs["input_ids"].shape[1]
        return [_answer(started, clock.times[1:], n_prompt, out.shape[1] - n_prompt) for _ in prompts]

    return answer


def openvino_answerer(directory: str, option: str) -> Answerer:
    """Continuous batching of OpenVINO GenAI; `option` is the inference precision hint, or "default"."""
    import openvino  # type: ignore[import-not-found]
    import openvino_genai as genai  # type: ignore[import-not-found]

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1  # GiB
    scheduler.enable_prefix_caching = False
    properties = {} if option == "default" else {"INFERENCE_PRECISION_HINT": option}
    pipeline = genai.ContinuousBatchingPipeline(directory, scheduler, "CPU", properties)

    class Clock(genai.StreamerBase):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.times: list[float] = []

        def write(self, token: object) -> object:
            self.times.append(time.perf_counter())
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    def pixels(path: str) -> object:
        return openvino.Tensor(numpy.asarray(Image.open(path).convert("RGB"))[None])

    def answer(prompts: Sequence[str], pictures: Sequence[str | None], n_tokens: int) -> list[Answer]:
        started = time.perf_counter()
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = n_tokens
        config.ignore_eos, config.do_sample, config.apply_chat_template = True, False, False
        images = [[pixels(path)] if path else [] for path in pictures]
        clock = Clock() if len(prompts) == 1 else None  # it streams one answer at a time
        found = pipeline.generate(
            list(prompts), images=images, generation_config=[config] * len(prompts), streamer=clock
        )
        metrics = [result.perf_metrics for result in found]
        if clock is not None:
            n = metrics[0].get_num_generated_tokens()
            return [_answer(started, clock.times, metrics[0].get_num_input_tokens(), n)]
        for m in metrics:  # each counts the tokens of the whole batch
            if m.get_num_generated_tokens() not in (n_tokens, n_tokens * len(prompts)):
                raise RuntimeError(f"{m.get_num_generated_tokens()} tokens came, {n_tokens} were asked for")
        return [
            {
                "ttft_s": m.get_ttft().mean / 1e3,
                "tpot_s": m.get_tpot().mean / 1e3,
                "prompt_tokens": m.get_num_input_tokens(),
                "output_tokens": n_tokens,
            }
            for m in metrics
        ]

    return answer


KINDS = {"transformers": transformers_answerer, "openvino": openvino_answerer}


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print; only replies go to the real stdout
    kind, directory, option = sys.argv[1:]
    answer = KINDS[kind](directory, option)
    print(json.dumps({"ready": option}), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        started = time.perf_counter()
        try:
            answers = answer(request["prompts"], request["pictures"], request["n_tokens"])
            reply: dict[str, object] = {"wall_s": time.perf_counter() - started, "answers": answers}
        except Exception as problem:  # the other side raises it
            reply = {"error": f"{type(problem).__name__}: {problem}"}
        print(json.dumps(reply), file=out, flush=True)


if __name__ == "__main__":
    main()
