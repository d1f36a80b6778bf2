"""The user's question as token ids. Question-aware reducers compare an image with the question.

The question is the text of the last user message that has text, without template and special tokens. The caption of
an image is the text after the image in the same message, up to the next image.
"""

from collections.abc import Callable, Sequence

from foveate.server.prepare.conversation import MessageText, PicturePlace, Turn

Encode = Callable[[str], list[int]]  # text to token ids, none of them a control token


def question_ids(encode: Encode, turns: Sequence[Turn]) -> list[int]:
    """Return the question's token ids. Empty if no user message has text."""
    texts = (_text(turn) for turn in reversed(turns) if turn.role == "user")
    return encode(next((text for text in texts if text), ""))


def caption_ids(encode: Encode, turns: Sequence[Turn]) -> list[list[int]]:
    """Return one list of caption ids per image, in image order. A list is empty if no text follows the image."""
    captions: list[str] = []
    for turn in turns:
        first = len(captions)
        for part in turn.parts():
            if isinstance(part, PicturePlace):
                captions.append("")
            elif isinstance(part, MessageText) and len(captions) > first:
                captions[-1] += f" {part.text}"
    return [encode(caption.strip()) for caption in captions]


def _text(turn: Turn) -> str:
    if isinstance(turn.content, str):
        return turn.content.strip()
    return " ".join(part.text for part in turn.parts() if isinstance(part, MessageText)).strip()
