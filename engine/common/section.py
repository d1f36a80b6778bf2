"""One JSON object of a checkpoint, read with its types checked. Imports no torch: the server reads it too."""

import json
import sys
from pathlib import Path
from typing import TypeGuard

_MOST = sys.float_info.max


def _is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value fits a float; JSON as Python reads it has NaN, Infinity and integers of any length."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_MOST <= value <= _MOST


class Section:
    """Values by key; a key that is absent or null gives the default, a value of the wrong type gives `error`.

    Args:
        values: the object.
        where: the file, and the path within it, for messages.
        error: what a wrong value raises: ConfigError or ModelError.
    """

    def __init__(self, values: dict[str, object], where: str, error: type[Exception]) -> None:
        self._values, self.where, self.error = values, where, error

    @classmethod
    def read(cls, file: Path, error: type[Exception]) -> "Section":
        """The whole of a JSON file; `error` if it is not there, or not an object."""
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except OSError as problem:
            raise error(f"{file}: {problem.strerror or problem}") from problem
        except ValueError as problem:
            raise error(f"{file} is not JSON: {problem}") from problem
        if not isinstance(values, dict):
            raise error(f"{file} holds no JSON object")
        return cls(values, str(file), error)

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def is_null(self, key: str) -> bool:
        """Whether the key is there and null, where that means something else than absent."""
        return key in self._values and self._values[key] is None

    def is_object(self, key: str) -> bool:
        return isinstance(self._values.get(key), dict)

    def keys(self) -> list[str]:
        """The keys that are not null."""
        return [key for key in self._values if key in self]

    def integer(self, key: str, default: int) -> int:
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(key, "a whole number")
        return value

    def positive(self, key: str, default: int) -> int:
        value = self.integer(key, default)
        if value < 1:
            raise self._wrong(key, "a positive whole number")
        return value

    def number(self, key: str, default: float) -> float:
        value = self._values.get(key)
        if value is None:
            return default
        if not _is_number(value):
            raise self._wrong(key, "a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(key, "text")
        return value

    def numbers(self, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """A list of numbers; a single number is a list of one."""
        value = self._values.get(key)
        if value is None:
            return default
        items = value if isinstance(value, list) else [value]
        numbers = [x for x in items if _is_number(x)]
        if len(numbers) != len(items):
            raise self._wrong(key, "a list of numbers")
        return tuple(float(x) for x in numbers)

    def integers(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """A list of whole numbers; a single one is a list of one."""
        numbers = self.numbers(key, default)
        if any(x != int(x) for x in numbers):
            raise self._wrong(key, "a list of whole numbers")
        return tuple(int(x) for x in numbers)

    def pairs(self, key: str, default: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        """A list of lists of two positive whole numbers each."""
        value = self._values.get(key)
        if value is None:
            return default
        pairs = [tuple(x) for x in value if isinstance(x, list)] if isinstance(value, list) else []
        pairs = [x for x in pairs if len(x) == 2 and all(isinstance(n, int) and n > 0 for n in x)]
        if not isinstance(value, list) or not pairs or len(pairs) != len(value):
            raise self._wrong(key, "a list of pairs of positive whole numbers")
        return tuple((x[0], x[1]) for x in pairs)

    def section(self, key: str) -> "Section":
        """The object under `key`, empty if there is none."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return Section(value or {}, f"{self.where}: {key}", self.error)

    def _wrong(self, key: str, legal: str) -> Exception:
        return self.error(f"{self.where}: {key} is {self._values[key]!r}, not {legal}")
