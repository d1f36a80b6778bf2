"""The start of the engine process: `python -P -m foveate.engine.start DIRECTORY LIFELINE`, configuration on stdin.

LIFELINE is the file descriptor of a pipe that the server holds open and never writes. The kernel closes the server's
end however the server dies, so a read that ends means that the server is gone. A thread waits for that from before the
slow imports on; a question for the parent's process id would come too late after them.
"""

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path
from threading import Thread

from foveate.engine.common import FROM_ENGINE, TO_ENGINE

ORPHANED = 1  # exit status
_PR_SET_PDEATHSIG = 1


def end_with_the_server(lifeline: int, directory: Path) -> None:
    """End this process as soon as the other end of the pipe `lifeline` is closed, and remove `directory` then.

    A stopped process would not notice, so the kernel lets this process continue when its parent dies.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)

    def wait() -> None:
        while os.read(lifeline, 1):
            pass
        remove_directory(directory)
        os._exit(ORPHANED)  # nobody is left to read the events or the exit status

    Thread(target=wait, name="lifeline", daemon=True).start()


def remove_directory(directory: Path) -> None:
    """Remove the sockets and the directory. Never removes anything else; no effect if the directory is gone.

    The server calls this when the engine process has ended, and the engine process when the server has.
    """
    for name in (TO_ENGINE, FROM_ENGINE):
        with contextlib.suppress(OSError):
            (directory / name).unlink()
    with contextlib.suppress(OSError):
        directory.rmdir()


def main() -> int:
    """Run the engine process; return its exit status."""
    directory, lifeline = Path(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the server too, which then says Shutdown
    end_with_the_server(lifeline, directory)
    from foveate.engine.process import run  # late: the imports take 3 s

    return run(directory)


if __name__ == "__main__":
    sys.exit(main())
