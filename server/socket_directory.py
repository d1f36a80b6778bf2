"""The private directory of the sockets to one engine process, locked as long as the server lives.

The kernel drops a lock with the process that holds the lock. So a directory without a lock has no server any more: if
server and engine process were killed together, the next start removes what they left.
"""

import contextlib
import fcntl
import os
import re
import tempfile
from pathlib import Path

from foveate.engine.common import FROM_ENGINE, TO_ENGINE
from foveate.engine.start import remove_directory

_PREFIX = "foveate-"
_NAME = re.compile(rf"{_PREFIX}[a-z0-9_]{{8}}")  # as `tempfile.mkdtemp` draws names
_PATH_LIMIT = 100  # bytes; the kernel's limit of a socket's path is 107


class SocketDirectory:
    """A directory that only this user can enter, with a path short enough for a Unix socket.

    Raises:
        OSError: no directory can be created.
    """

    def __init__(self) -> None:
        base = _base()
        _sweep(base)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))  # mode 0700
            with contextlib.suppress(FileNotFoundError):  # swept by another server before the lock was taken
                self._lock = _locked(self.path, fcntl.LOCK_EX)
                return

    def remove(self) -> None:
        """Remove the directory and the sockets in it, then drop the lock."""
        remove_directory(self.path)
        os.close(self._lock)


def _base() -> Path:
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    longest = f"{base}/{_PREFIX}12345678/{max(TO_ENGINE, FROM_ENGINE, key=len)}"
    usable = os.access(base, os.W_OK) and len(os.fsencode(longest)) <= _PATH_LIMIT
    return Path(base if usable else "/tmp")


def _sweep(base: Path) -> None:
    """Remove the directories of this user whose server is gone."""
    with contextlib.suppress(OSError), os.scandir(base) as entries:
        for entry in entries:
            if not _NAME.fullmatch(entry.name):
                continue
            with contextlib.suppress(OSError):  # another user's, or in use
                lock = _locked(Path(entry.path), fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_directory(Path(entry.path))
                os.close(lock)


def _locked(directory: Path, how: int) -> int:
    """Lock a directory; return the file descriptor that holds the lock.

    Raises:
        FileNotFoundError: the directory was removed meanwhile.
        OSError: the directory belongs to another user, or its lock is taken.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)  # closed in child processes
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.getuid() or found.st_mode & 0o777 != 0o700:
            raise PermissionError(f"{directory} is not a private directory of this user")
        fcntl.flock(descriptor, how)
        if os.stat(directory).st_ino != found.st_ino:
            raise FileNotFoundError(f"{directory} was replaced")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
