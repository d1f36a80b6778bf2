"""What the user asks, as token ids: what question-aware reducers compare a picture with.

The question is the text of the last user message that has any, without template and special tokens: the user's own
words, whatever the model wraps them in. A picture's caption is the text that follows it in its message, up to the next
picture.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer

from foveate.server.checks import parts
from foveate.server.protocol import ImagePart, Message, TextPart


def question_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Empty if no user message has text."""
    texts = (_text(message) for message in reversed(messages) if message.role == "user")
    return _ids(tokenizer, next((text for text in texts if text), ""))


def caption_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[list[int]]:
    """One list per picture, in the order of the pictures; empty where no text follows."""
    captions: list[str] = []
    for message in messages:
        first = len(captions)
        for _, part in parts(message, ""):
            if isinstance(part, ImagePart):
                captions.append("")
            elif isinstance(part, TextPart) and len(captions) > first:
                captions[-1] += f" {part.text}"
    return [_ids(tokenizer, caption.strip()) for caption in captions]


def _text(message: Message) -> str:
    if isinstance(message.content, str):
        return message.content.strip()
    return " ".join(part.text for _, part in parts(message, "") if isinstance(part, TextPart)).strip()


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids if text else []
    return ids
