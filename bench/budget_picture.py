"""Draw docs/budget.png: one question at full and at a quarter of the budget, with the kept patches on the image.

    python -m bench.budget_picture
    python -m bench.budget_picture --seed 7 --question count --rounds 9

A server runs tiny-llava. Both budgets ask the same question about the same held-out scene. `VLM-Explain: kept_map`
names the kept patches. The times are medians over the rounds, both budgets in turns. The prefix cache is off, so the
decoder reads the picture in every round. The feature cache holds the picture, so the vision tower runs in no round: its
time does not depend on the budget. All numbers also go to bench/results/budget_picture.md.
"""

import argparse
import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import httpx
from PIL import Image, ImageDraw, ImageFont

from bench.report import Json, provenance, table, write
from bench.scenes import Item, body, data_url
from bench.server import Server, serving
from bench.stream import streamed
from foveate.bundled.scenes import HELD_OUT_SEED, Scene, make_scene, questions, render

PICTURE = Path(__file__).parents[1] / "docs" / "budget.png"
MODEL, METHOD, MAX_TOKENS = "tiny-llava", "foveal", 80
BUDGETS = (("full budget", 1.0), ("quarter budget", 0.25))
PICTURE_SIZE = (240, 240)  # pixels, as the server receives the picture
PANEL, MARGIN, HEAD, CAPTION = 432, 28, 64, 186  # pixels of the drawing
INK, GREY, FRAME, PAPER, ACCENT = (24, 28, 34), (96, 104, 116), (200, 204, 210), (255, 255, 255), (0, 96, 199)


@dataclass(frozen=True)
class Panel:
    """The result of one budget."""

    name: str
    answer: str
    offered: int  # visual tokens
    kept: int
    kept_map: list[int]  # run lengths in reading order: dropped, kept, dropped, ...
    first_ms: float = 0.0  # time to first token, median
    prefill_ms: float = 0.0  # of which the language model's pass over the prompt


def ask(server: Server, item: Item, name: str, ratio: float) -> Panel:
    """One answer with its kept map.

    Raises:
        RuntimeError: the server refuses.
    """
    request = body(server.model, item, MAX_TOKENS, METHOD, ratio)
    headers = {"VLM-Explain": "kept_map"}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=request, headers=headers, timeout=60, trust_env=False)
    if reply.status_code != 200:
        raise RuntimeError(f"{reply.status_code} {reply.text[:500]}")
    told = reply.json()
    visual = told["usage"]["vlm"]["visual"]
    return Panel(
        name=name,
        answer=told["choices"][0]["message"]["content"].strip(),
        offered=visual["offered"],
        kept=visual["kept"],
        kept_map=visual["per_image"][0]["kept_map"],
    )


async def time_panels(server: Server, item: Item, panels: Sequence[Panel], rounds: int) -> list[Panel]:
    """The panels with their times: every budget once a round."""
    first: list[list[float]] = [[] for _ in panels]
    prefill: list[list[float]] = [[] for _ in panels]
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        for _ in range(rounds):
            for i, (_, ratio) in enumerate(BUDGETS):
                stated = body(server.model, item, MAX_TOKENS, METHOD, ratio)
                request = json.dumps(stated | {"stream": True, "stream_options": {"include_usage": True}}).encode()
                one = await streamed(client, server.url, request, {})
                first[i].append(1e3 * one.pieces_s[0])
                prefill[i].append(1e3 * one.prefill_s)
    return [replace(panel, first_ms=median(first[i]), prefill_ms=median(prefill[i])) for i, panel in enumerate(panels)]


def kept_patches(kept_map: Sequence[int]) -> list[bool]:
    """Whether each patch is kept, in reading order."""
    return [bool(i % 2) for i, length in enumerate(kept_map) for _ in range(length)]


def draw_panel(scene: Scene, panel: Panel) -> Image.Image:
    """The picture with dropped patches faded and a frame around the kept ones. [PANEL, PANEL]."""
    kept = kept_patches(panel.kept_map)
    side = round(len(kept) ** 0.5)
    assert side * side == len(kept), "tiny-llava offers a square grid"
    picture = render(scene).resize((PANEL, PANEL), Image.Resampling.LANCZOS)
    faded = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, PAPER), 0.78)
    if all(kept):
        return picture
    edges = [round(PANEL * i / side) for i in range(side + 1)]
    for i, is_kept in enumerate(kept):
        row, column = divmod(i, side)
        box = (edges[column], edges[row], edges[column + 1], edges[row + 1])
        if is_kept:
            faded.paste(picture.crop(box), box)
            ImageDraw.Draw(faded).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=ACCENT)
    return faded


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text with line breaks, so that no line is wider than `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def draw(scene: Scene, question: str, panels: Sequence[Panel], rounds: int) -> Image.Image:
    """Both panels side by side, each with its visual tokens, times and answer below."""
    width = MARGIN + len(panels) * (PANEL + MARGIN)
    canvas = Image.new("RGB", (width, HEAD + PANEL + CAPTION), PAPER)
    pen = ImageDraw.Draw(canvas)
    title, large, small = (ImageFont.load_default(size) for size in (24, 20, 16))
    pen.text((MARGIN, 18), f"“{question}”", INK, title)
    for i, panel in enumerate(panels):
        left, top = MARGIN + i * (PANEL + MARGIN), HEAD
        canvas.paste(draw_panel(scene, panel), (left, top))
        pen.rectangle((left, top, left + PANEL - 1, top + PANEL - 1), outline=FRAME)
        top += PANEL + 12
        times = f"prefill {panel.prefill_ms:.1f} ms, first token after {panel.first_ms:.1f} ms"
        pen.text((left, top), f"{panel.name}: {panel.kept} of {panel.offered} visual tokens", INK, large)
        pen.text((left, top + 28), times, ACCENT, large)
        pen.multiline_text((left, top + 62), wrapped(panel.answer, small, PANEL), INK, small, spacing=5)
    pen.text((MARGIN, canvas.height - 28), _small_print(rounds), GREY, small)
    return canvas


def _small_print(rounds: int) -> str:
    return f"{MODEL} on a CPU, method {METHOD}. Medians of {rounds} rounds, without the vision tower."


def measured(item: Item, rounds: int) -> list[Panel]:
    """Ask and time both budgets on a server of our own."""
    with serving(MODEL, ("cache.prefix_sharing=false",)) as server:
        panels = [ask(server, item, name, ratio) for name, ratio in BUDGETS]
        return asyncio.run(time_panels(server, item, panels, rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=21, help="which held-out scene")
    parser.add_argument("--question", default="describe", help="a kind of question of the scene")
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    made_by, scene = provenance("bench.budget_picture"), make_scene(HELD_OUT_SEED + args.seed, PICTURE_SIZE)
    question = next(q for q in questions(scene, seed=0) if q.kind == args.question)
    panels = measured(Item(scene, data_url(scene), question), args.rounds)
    draw(scene, question.text, panels, args.rounds).quantize(128).save(PICTURE, optimize=True)
    header = ["budget", "visual tokens", "first token ms", "prefill ms", "answer"]
    rows = [[p.name, f"{p.kept} of {p.offered}", f"{p.first_ms:.1f}", f"{p.prefill_ms:.1f}", p.answer] for p in panels]
    results: Json = [asdict(panel) for panel in panels]
    said = f"“{question.text}” about held-out scene {args.seed}. The right answer is “{question.answer}”"
    sections = [said, table(header, rows), _small_print(args.rounds)]
    write("budget_picture", "One question at two budgets", made_by, results, sections)


if __name__ == "__main__":
    main()
