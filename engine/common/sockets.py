"""The directory of sockets between server and engine process: the names in the directory, and its removal.

The server creates the directory and removes the directory when the engine process has ended. If the server dies first,
the engine process removes the directory.
"""

import contextlib
from pathlib import Path

TO_ENGINE, FROM_ENGINE = "to_engine", "from_engine"


def remove_directory(directory: Path) -> None:
    """Remove the sockets and the directory. Never removes anything else; no effect if the directory is gone."""
    for name in (TO_ENGINE, FROM_ENGINE):
        with contextlib.suppress(OSError):
            (directory / name).unlink()
    with contextlib.suppress(OSError):
        directory.rmdir()
