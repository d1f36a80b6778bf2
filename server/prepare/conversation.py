"""A conversation as the prompt reads it: roles, texts and the places of pictures, whatever the pictures come from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MessageText:
    """A text part of a message; `path` is its place in the request, for errors."""

    text: str
    path: str = ""


@dataclass(frozen=True, slots=True)
class PicturePlace:
    """The place of a picture in a message."""

    path: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message: its content is a text, or parts in order."""

    role: str
    content: str | Sequence[MessageText | PicturePlace]
    path: str = ""

    def parts(self) -> Iterator[MessageText | PicturePlace]:
        """The parts; none for plain text."""
        if not isinstance(self.content, str):
            yield from self.content


def n_chars(turns: Sequence[Turn]) -> int:
    """Characters of all texts."""
    total = 0
    for turn in turns:
        if isinstance(turn.content, str):
            total += len(turn.content)
        total += sum(len(part.text) for part in turn.parts() if isinstance(part, MessageText))
    return total
