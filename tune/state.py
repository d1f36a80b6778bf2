"""Store each measurement as one JSON line, so that an interrupted run continues at the same place."""

from pathlib import Path
from typing import TypeVar

import msgspec

from foveate.configs.errors import ConfigError

T = TypeVar("T")


class _Line(msgspec.Struct, frozen=True):
    run: str
    key: str
    value: msgspec.Raw


class State:
    """A file of measurements.

    Args:
        run: fingerprint of the common inputs. Lines of other runs are kept but ignored.

    Raises:
        ConfigError: the file cannot be read or written, or a line is broken. An incomplete last line (the writer was
            killed) is removed instead.
    """

    def __init__(self, file: Path, run: str) -> None:
        self._file, self._run = file, run
        self._values: dict[str, msgspec.Raw] = {}
        if file.exists():
            try:
                self._read(file)
            except OSError as error:
                raise ConfigError(f"{file}: {error.strerror}") from None

    def get(self, key: str, kind: type[T]) -> T | None:
        """Return the value of a key, or None if the key was never measured."""
        if key not in self._values:
            return None
        try:
            return msgspec.json.decode(self._values[key], type=kind)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{self._file}: {key}: {error}; delete the file to start anew") from None

    def put(self, key: str, value: object) -> None:
        """Add a value. The value is in the file when `put` returns."""
        raw = msgspec.Raw(msgspec.json.encode(value))
        try:
            with self._file.open("ab") as out:
                out.write(msgspec.json.encode(_Line(self._run, key, raw)) + b"\n")
        except OSError as error:
            raise ConfigError(f"{self._file}: {error.strerror}") from None
        self._values[key] = raw

    def _read(self, file: Path) -> None:
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with file.open("r+b") as opened:
                opened.truncate(len(whole))
        for number, text in enumerate(whole.splitlines(), 1):
            try:
                line = msgspec.json.decode(text, type=_Line)
            except msgspec.DecodeError as error:
                raise ConfigError(f"{file}:{number}: broken ({error}); delete the file to start anew") from None
            if line.run == self._run:
                self._values[line.key] = msgspec.Raw(bytes(line.value))
