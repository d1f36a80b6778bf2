"""A conversation for the prompt: roles, texts and image places. The source of the images does not matter here."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MessageText:
    """A text part of a message. `path`: place in the request, for errors."""

    text: str
    path: str = ""


@dataclass(frozen=True, slots=True)
class PicturePlace:
    """The place of an image in a message."""

    path: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. The content is a text or a list of parts in order."""

    role: str
    content: str | Sequence[MessageText | PicturePlace]
    path: str = ""

    def parts(self) -> Iterator[MessageText | PicturePlace]:
        """Yield the parts. Plain text has no parts."""
        if not isinstance(self.content, str):
            yield from self.content
