"""What SIGINT and SIGTERM do while no event loop runs: one line on stderr and the end of the program, no traceback.

`foveate serve` may be interrupted at any moment of its start, during imports too. Nothing has to be put in order then:
an engine process that was started notices the end of the server and removes its directory.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def status(number: int) -> int:
    """Exit status of a server that a signal stopped before the server was ready, as shells give it."""
    return 128 + number


def tell(number: int) -> None:
    """Say on stderr which signal stopped the start."""
    os.write(2, f"foveate: stopped by {signal.Signals(number).name} before it was ready\n".encode())


def is_command_line() -> bool:
    """Whether this process is the program `foveate`, and not a program that uses its modules."""
    return Path(sys.argv[0]).name in ("foveate", "main.py", "-m")


def end_at_once() -> None:
    """From now on, end the process at SIGINT and SIGTERM."""
    for number in SIGNALS:
        signal.signal(number, _end)


def restore() -> None:
    """Undo `end_at_once`, for commands that put something in order when interrupted."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(number: int, _: FrameType | None) -> None:
    tell(number)
    os._exit(status(number))
