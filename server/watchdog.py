"""Tells an engine process that hangs from one that loads a model or runs a long step."""

import os
import time
from pathlib import Path

from foveate.configs.config import ServerConfig
from foveate.engine.common import FromEngine, Pulse

CHECK_S = 1.0  # between two calls of `verdict`
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Watchdog:
    """Watches one engine process, from its start on.

    The process is alive if it sends anything, if it uses CPU time or if it waits for a disk. So neither the load of a
    model nor C++ code that keeps the pulse from running is taken for a hang; a stopped process and a deadlock are. A
    step may still never end: a step has a limit of its own.
    """

    def __init__(self, pid: int, config: ServerConfig) -> None:
        self._stat = Path(f"/proc/{pid}/stat")
        self._config = config
        self._alive_at = self._checked_at = time.monotonic()
        self._ticks = 0
        self._turn_began: float | None = None  # None: no pulse yet

    @property
    def turn_s(self) -> float:
        """Seconds since the engine's turn in progress began, by its last pulse; 0 before the first pulse."""
        return 0.0 if self._turn_began is None else time.monotonic() - self._turn_began

    def heard(self, event: FromEngine) -> None:
        """Note an event of the process."""
        self._alive_at = time.monotonic()
        if isinstance(event, Pulse):
            self._turn_began = self._alive_at - event.turn_s

    def verdict(self) -> str | None:
        """Return None if the process works, else in words why it counts as hung. Call every `CHECK_S`."""
        now = time.monotonic()
        if now - self._checked_at > 5 * CHECK_S:  # this process was held up itself, and has events to read yet
            self._alive_at = now
            self._turn_began = None
        self._checked_at = now
        if self._works():
            self._alive_at = now
        silent_s, limits = now - self._alive_at, self._config
        if silent_s >= limits.engine_hang_s:
            return f"it hung: no event and no CPU time for {silent_s:.0f} s (server.engine_hang_s)"
        if self.turn_s >= limits.engine_step_s:
            return f"it hung: one step ran for {self.turn_s:.0f} s (server.engine_step_s)"
        return None

    def _works(self) -> bool:
        """Whether the process has used CPU time since the last call, or waits for a disk."""
        try:
            fields = self._stat.read_text().rpartition(")")[2].split()  # a name may contain spaces
        except OSError:  # ended: the end of the process is noticed elsewhere
            return True
        before, self._ticks = self._ticks, int(fields[11]) + int(fields[12])  # user and system time, see proc(5)
        return self._ticks > before or fields[0] == "D"
