"""A server that is killed at any moment of its start leaves no process and no directory, and shows no traceback.

FOVEATE_KILLS sets the number of moments for each way to kill (default 2).
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

N_KILLS = int(os.environ.get("FOVEATE_KILLS", "2"))
START_S = 4.0
STATUS = {signal.SIGINT: (0, 130), signal.SIGTERM: (0, 143), signal.SIGKILL: (-signal.SIGKILL,)}
# Before its own first line runs, Python itself answers a signal.
EARLY = {signal.SIGINT: (-signal.SIGINT,), signal.SIGTERM: (-signal.SIGTERM,), signal.SIGKILL: ()}


def start(directory: Path, log: Path) -> subprocess.Popen[bytes]:
    script = str(Path(sys.executable).with_name("foveate"))
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "XDG_RUNTIME_DIR": str(directory)}
    with log.open("wb") as out:
        return subprocess.Popen(
            [script, "serve", "--port", "0"], stdout=out, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip


def left(directory: Path) -> list[str]:
    """The processes that have the directory in their command line or environment, and what is in the directory."""
    found = [path.name for path in directory.iterdir()]
    for process in psutil.process_iter(["pid"]):
        try:
            ours = process.environ().get("XDG_RUNTIME_DIR") == str(directory)
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return found


def until_nothing_is_left(directory: Path, limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while found := left(directory):
        assert time.monotonic() < deadline, f"left behind: {found}"
        time.sleep(0.1)


@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
@pytest.mark.parametrize("number", STATUS, ids=lambda number: number.name)
def test_nothing_is_left(tmp_path: Path, number: signal.Signals, group: bool) -> None:
    moments = random.Random(f"{number}{group}")
    for i in range(N_KILLS):
        after_s = START_S * (i + moments.random()) / N_KILLS  # one in each of equal parts
        directory, log = tmp_path / str(i), tmp_path / f"{i}.log"
        directory.mkdir()
        server = start(directory, log)
        time.sleep(after_s)
        if group:
            os.killpg(server.pid, number)
        else:
            server.send_signal(number)
        status, text = server.wait(20), log.read_text()
        where = f"{number.name} after {after_s:.2f} s: status {status}\n{text}"
        until_nothing_is_left(directory)
        began = bool(text)
        assert status in STATUS[number] or (not began and status in EARLY[number]), where
        assert "Traceback" not in text, where
        if status > 128:
            assert text.count("before it was ready") == 1, where


def test_a_stopped_engine_does_not_outlive_its_server(tmp_path: Path) -> None:
    server = start(tmp_path, tmp_path.parent / "log")
    engine = None
    while engine is None:
        engine = next(iter(psutil.Process(server.pid).children()), None)
    time.sleep(0.3)
    engine.suspend()
    server.kill()
    server.wait(10)
    until_nothing_is_left(tmp_path)


def test_the_next_start_removes_what_two_killed_processes_left(tmp_path: Path) -> None:
    log = tmp_path.parent / "log"
    server = start(tmp_path, log)
    while not list(tmp_path.glob("foveate-*/from_engine")):
        time.sleep(0.01)
    (engine,) = psutil.Process(server.pid).children()
    server.send_signal(signal.SIGSTOP)  # it must not clean up after the engine
    engine.kill()
    server.kill()
    server.wait(10)
    (stale,) = tmp_path.glob("foveate-*")
    foreign = tmp_path / "foveate-mine0000"
    foreign.mkdir(mode=0o700)
    (foreign / "notes").write_text("of the user")
    server = start(tmp_path, log)
    while stale.exists():
        time.sleep(0.05)
    server.terminate()
    server.wait(20)
    assert [path.name for path in tmp_path.iterdir()] == ["foveate-mine0000"] and (foreign / "notes").exists()
