"""A progress line on stderr."""

import sys
import time
from typing import TextIO


class Progress:
    """Rewrites one line on a terminal. Elsewhere, writes a new line now and then.

    Args:
        total: expected steps. A run may exceed this number, because the length of a bisection is unknown in advance.
    """

    def __init__(self, total: int, out: TextIO | None = None) -> None:
        self._total, self._done = total, 0
        self._out = out or sys.stderr
        self._in_place = self._out.isatty()
        self._began = time.monotonic()
        self._written = -1e9
        self._width = 0

    def step(self, text: str) -> None:
        """Count one finished step. `text`: result of the step."""
        self._done += 1
        now = time.monotonic()
        if not self._in_place and now - self._written < 5.0:
            return
        self._written = now
        share = min(99, 100 * self._done // max(1, self._total))
        line = f"tune: {share:2d} %, {self._done} measured, {now - self._began:.0f} s: {text}"
        if self._in_place:
            line = line[:119]
            print(f"\r{line:<{self._width}}", end="", file=self._out, flush=True)
            self._width = len(line)
        else:
            print(line, file=self._out, flush=True)

    def end(self) -> None:
        """End the progress line."""
        if self._in_place and self._width:
            print(file=self._out, flush=True)
