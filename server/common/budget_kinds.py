"""Kinds of budget fields: their type in the body, their bounds, and how a header states them."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, FiniteFloat

from foveate.server.common.errors import invalid_vlm
from foveate.server.common.header_fields import Bare
from foveate.server.common.numbers import integer, share

MAX_COUNT = 1_000_000  # of visual tokens: far above any context
FieldValue = bool | int | float | str


@dataclass(frozen=True, slots=True)
class Count:
    """An integer from 1 to `MAX_COUNT`, or one of some words."""

    words: tuple[str, ...] = ()

    @property
    def annotation(self) -> Any:
        number: Any = Annotated[int, Field(ge=1, le=MAX_COUNT)]
        return Annotated[number | Literal[self.words] if self.words else number, BeforeValidator(integer)]

    @property
    def legal(self) -> str:
        return " or ".join(["a count", *(f"`{word}`" for word in self.words)]) if self.words else "a count"

    def read(self, where: str, value: Bare) -> FieldValue:
        if isinstance(value, str) and value in self.words:
            return value
        count = integer(value)
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_COUNT:
            also = f", {' or '.join(self.words)}" if self.words else ""
            raise invalid_vlm(where, f"expected an integer from 1 to {MAX_COUNT}{also}")
        return count


@dataclass(frozen=True, slots=True)
class Ratio:
    """A number above 0 and up to 1, or a percentage."""

    annotation: Any = Annotated[FiniteFloat, Field(gt=0, le=1), BeforeValidator(share)]
    legal: str = "above 0, up to 1, or `25%`"

    def read(self, where: str, value: Bare) -> FieldValue:
        ratio = share(value)
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise invalid_vlm(where, "expected a number above 0 and up to 1, or a percentage such as 25%")
        return float(ratio)


@dataclass(frozen=True, slots=True)
class Flag:
    """`?1` or `?0` in a header, true or false in the body."""

    annotation: Any = bool
    legal: str = "`?1` or `?0`; in the body true or false"

    def read(self, where: str, value: Bare) -> FieldValue:
        if not isinstance(value, bool):
            raise invalid_vlm(where, "expected ?1 or ?0")
        return value


@dataclass(frozen=True, slots=True)
class Word:
    """One of some words; in a header `?0` asks for nothing."""

    words: tuple[str, ...]

    @property
    def annotation(self) -> Any:
        return Literal[self.words]

    @property
    def legal(self) -> str:
        return " or ".join(f"`{word}`" for word in self.words)

    def read(self, where: str, value: Bare) -> FieldValue:
        if value is False:
            return ""
        if value not in self.words:
            raise invalid_vlm(where, f"expected {' or '.join(self.words)} or ?0")
        return value


@dataclass(frozen=True, slots=True)
class Text:
    """A text whose meaning is checked later; `verbatim`: the header holds the text itself, not one RFC 8941 item."""

    legal: str
    example: str
    max_chars: int
    description: str
    verbatim: bool = False

    @property
    def annotation(self) -> Any:
        return Annotated[str, Field(max_length=self.max_chars, description=self.description)]

    def read(self, where: str, value: Bare) -> FieldValue:
        if not isinstance(value, str):
            raise invalid_vlm(where, f"expected {self.example}")
        return value


FieldKind = Count | Ratio | Flag | Word | Text
