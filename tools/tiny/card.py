"""Model cards of the bundled models."""

from typing import Any

_CARD = """\
---
license: apache-2.0
pipeline_tag: image-text-to-text
---
# {name}

A {architecture} model of {parameters:.1f} million parameters that ships with Foveate, so that the server, its demo and
its tests run without a download. The model is an ordinary Hugging Face directory:
`{klass}.from_pretrained` loads the directory.

{shape}

## What it can do

Answer short questions about pictures made by `foveate.bundled.scenes`: one to five coloured shapes and usually a
written word or number. Questions are about a colour, a shape, a count, a place, whether something is there, and the
writing; or they ask for a description. It knows nothing else: other pictures and other questions give arbitrary
answers. Words are read letter by letter and are not limited to the list that the pictures use.

## Training

Randomly initialised;
{origin}.
Trained on {first_pictures:,} generated pictures, in the later part each with about ten questions that share its visual
tokens, in {first_minutes} minutes on two shared CPU cores with `tools/tiny` (`python -m tiny.train`). All text stood
behind the picture. Then the decoder alone went on (`--decoder-only --text-first 0.6`) with {pictures:,} pictures in
{minutes:.0f} minutes on one shared core; in three fifths of the batches the text stands before the picture, with four
questions per picture. Tower, projector and embeddings did not change. No picture has a seed of the held-out set.
{log}

Auxiliary losses, whose heads are not part of the model, make the training short:

- Each patch feature predicts what the patch shows (colour, shape, character, place of the character in the word).
- Each visual token is pulled towards the embeddings of the words for what it shows.
- In decoder layers 1 and 2, heads 0 and 3 are led to attend to the patches that a question is about; this loss fades
  to zero during training.
{extra}
Every other batch keeps only a random subset of the visual tokens, at their original positions: scattered, in blocks,
evenly spaced, biased towards the shapes, or nothing but the shapes. An answer whose evidence was dropped is not trained
on.

## Accuracy

Exact match in percent of greedy answers on the held-out scenes `make_scene(HELD_OUT_SEED + i)`, i < {held_out}, one
question of each kind per scene ("read" only where something is written), with the picture first and with the text
first, asked through the server by `python -m bench.quality --accuracy`. What is left under a budget:
`bench/results/quality.md`.

{table}
"""

_LLAVA: dict[str, Any] = {
    "name": "tiny-llava",
    "architecture": "LLaVA-1.5",
    "klass": "LlavaForConditionalGeneration",
    "shape": (
        "A CLIP tower (width 128, 5 layers of which the second-to-last is selected, 168 pixels in patches of 14 and a\n"
        "CLS token: 144 visual tokens), a two-layer projector and a Llama decoder (width 192, 4 layers, 6 heads, 2\n"
        "key/value heads). Pictures are resized to 168 x 168 without cropping."
    ),
    "origin": "first the tower and projector with the auxiliary losses, then everything together",
    "first_pictures": 103_616,
    "first_minutes": 91,
    "log": "The log is `bench/results/train-tiny-llava.log`.",
    "extra": (
        "- The CLS token predicts the set of shapes and characters and is led to attend to them. LLaVA drops its\n"
        "  output, but methods that select visual tokens by the attention of the CLS token rely on it.\n"
    ),
}

_QWEN: dict[str, Any] = {
    "name": "tiny-qwen2-vl",
    "architecture": "Qwen2-VL",
    "klass": "Qwen2VLForConditionalGeneration",
    "shape": (
        "A Qwen2-VL tower (width 128, 4 layers, patches of 8 pixels merged two by two) and a Qwen2 decoder with\n"
        "M-RoPE (width 192, 4 layers, 6 heads, 2 key/value heads). Pictures keep their aspect and become about 72 to\n"
        "88 visual tokens."
    ),
    "origin": "first the tower alone with the auxiliary losses; then, with the decoder of tiny-llava, everything",
    "first_pictures": 74_400,
    "first_minutes": 92,
    "log": "The log is `bench/results/train-tiny-qwen2-vl.log`.",
    "extra": (
        "- The visual tokens after the first decoder layer are pulled towards the words for the region they lie in,\n"
        "  which only M-RoPE tells.\n"
    ),
}


def card(family: str, parameters: int, state: dict[str, Any], table: str, held_out: int = 1000) -> str:
    """Return the README of a model. `state`: state of the training run. `table`: Markdown from `tiny.evaluate`."""
    return _CARD.format(
        **(_LLAVA if family == "llava" else _QWEN),
        parameters=parameters / 1e6,
        pictures=state["pictures"],
        minutes=state["elapsed"] / 60,
        table=table.strip(),
        held_out=held_out,
    )
