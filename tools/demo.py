"""Ask a served model about a rendered picture, at full visual budget and at a quarter of it.

Starts `foveate serve` on a free port, asks through the official `openai` client, streams the answers, stops the server.
The prefix cache is off, so every question reads the picture anew; the picture is encoded once, by a first request that
is not timed. Times are measured here, at the client.
"""

import argparse
import base64
import io
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from openai import OpenAI, OpenAIError
from openai.types.chat import ChatCompletionContentPartImageParam

from foveate.bundled.scenes import HELD_OUT_SEED, Question, make_scene, questions, render
from foveate.server.launch import LaunchError, launched

BUDGETS = (("full", "1"), ("quarter", "0.25"))  # name, VLM-Visual-Ratio
MAX_TOKENS = 80
ANSWER_WIDTH = 26


class DemoError(Exception):
    """An answer has no text or no usage."""


@dataclass(frozen=True)
class Spent:
    """The cost of one answer."""

    text: str
    offered: int
    kept: int
    first_s: float
    total_s: float


def ask(client: OpenAI, model: str, picture: str, question: str, ratio: str, show: bool) -> Spent:
    """Stream one greedy answer. If `show`, print the answer as it arrives.

    Args:
        picture: data URL of the image.
        ratio: share of the visual tokens to keep, the value of the header VLM-Visual-Ratio.

    Raises:
        DemoError: the stream had no text or no usage.
        OpenAIError: the server refused, or the connection broke.
    """
    image: ChatCompletionContentPartImageParam = {"type": "image_url", "image_url": {"url": picture}}
    started = time.perf_counter()
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": [image, {"type": "text", "text": question}]}],
        temperature=0,
        max_tokens=MAX_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"VLM-Visual-Ratio": ratio},
    )
    text, first_s, usage = "", 0.0, None
    for chunk in stream:
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece:
            first_s = first_s or time.perf_counter() - started
            text += piece
            if show:
                print(piece.replace("\n", " "), end="", flush=True)
        usage = chunk.usage or usage
    if not text or usage is None or usage.model_extra is None:
        raise DemoError(f"no answer to {question!r} at ratio {ratio}: text {text!r}, usage {usage}")
    visual = usage.model_extra["vlm"]["visual"]
    return Spent(text.strip(), visual["offered"], visual["kept"], first_s, time.perf_counter() - started)


def _numbers(spent: Spent) -> str:
    return f"{spent.kept:>4} of {spent.offered:<4} {1e3 * spent.first_s:>7.0f} ms {1e3 * spent.total_s:>7.0f} ms"


def _ask_all(client: OpenAI, model: str, picture: str, asked: Sequence[Question]) -> dict[str, list[Spent]]:
    ask(client, model, picture, asked[0].text, BUDGETS[0][1], show=False)  # encodes the image; not timed
    spent: dict[str, list[Spent]] = {name: [] for name, _ in BUDGETS}
    print(f"  {'budget':<9}{'answer':<{ANSWER_WIDTH}}  {'visual tokens':<12}  {'first':>7}  {'total':>9}")
    for question in asked:
        print(f"\n{question.text}")
        for name, ratio in BUDGETS:
            print(f"  {name:<9}", end="", flush=True)
            one = ask(client, model, picture, question.text, ratio, show=True)
            spent[name].append(one)
            # A long answer fills the columns, so print its numbers on a new line.
            fits = len(one.text) <= ANSWER_WIDTH
            print(" " * (ANSWER_WIDTH - len(one.text)) if fits else "\n" + " " * (11 + ANSWER_WIDTH), end="")
            verdict = "" if one.text == question.answer else f"   (it is: {question.answer})"
            print(f"  {_numbers(one)}{verdict}")
    return spent


def demonstrate(model: str, picture: str, asked: Sequence[Question]) -> None:
    """Serve `model`, ask all questions at both budgets, print the table and the summary."""
    with (
        launched(model, "--set", "cache.prefix_sharing=false") as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120.0) as client,
    ):
        name = client.models.list().data[0].id
        print(f"\n{name}, ready after {server.ready_s:.1f} s\n")
        spent = _ask_all(client, name, picture, asked)
    print()
    for budget, answers in spent.items():
        right = sum(one.text == question.answer for one, question in zip(answers, asked, strict=True))
        print(
            f"{budget:<8} {right} of {len(asked)} right, {sum(a.kept for a in answers)} visual tokens read, "
            f"median time to first token {1e3 * median(a.first_s for a in answers):.0f} ms"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", default=["tiny-llava"], help="bundled: tiny-llava (default), tiny-qwen2-vl"
    )
    parser.add_argument("--seed", type=int, default=7, help="which picture; none was seen in training (default: 7)")
    parser.add_argument("--picture", type=Path, default=Path(tempfile.gettempdir()) / "foveate-demo.png")
    args = parser.parse_args()
    os.environ["NO_PROXY"] = "127.0.0.1"  # a proxy cannot reach the local server
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("\ndemo: stopped"))  # runs `finally`: the server stops too
    scene = make_scene(HELD_OUT_SEED + args.seed)
    image = render(scene)
    image.save(args.picture)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    print(f"The picture, {image.width} x {image.height}: {args.picture}")
    try:
        for model in args.models:
            demonstrate(model, url, questions(scene, seed=0))
    except (DemoError, LaunchError, OpenAIError) as error:
        sys.exit(f"\ndemo: {error}")


if __name__ == "__main__":
    main()
