"""Directories of sockets: one per engine process, and those of dead servers are removed."""

import os
import tempfile
from pathlib import Path

import pytest

from foveate.server import socket_directory
from foveate.server.socket_directory import SocketDirectory


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def make(path: Path, mode: int = 0o700, *names: str) -> Path:
    path.mkdir()
    path.chmod(mode)
    for name in names:
        (path / name).touch()
    return path


def test_a_start_removes_what_dead_servers_left_and_nothing_else(base: Path) -> None:
    living = SocketDirectory()
    stale = make(base / "foveate-abcd_123", 0o700, "to_engine", "from_engine")
    empty = make(base / "foveate-abcd_124")
    kept = [
        make(base / "foveate-result"),
        make(base / "foveate-abcd_12345"),
        make(base / "foveate-abcd_125", 0o755),
        make(base / "foveate-abcd_126", 0o700, "from_engine", "notes"),
        make(base / "other"),
    ]
    (base / "foveate-abcd_127").symlink_to(make(base / "elsewhere"))
    own = SocketDirectory()
    assert not stale.exists() and not empty.exists()
    assert living.path.exists() and own.path.exists() and own.path.stat().st_mode & 0o777 == 0o700
    assert all(path.exists() for path in kept) and (kept[3] / "notes").exists()
    assert (base / "foveate-abcd_127").is_symlink() and (base / "elsewhere").exists()
    for directory in (living, own):
        directory.remove()
        assert not directory.path.exists()


def test_a_directory_swept_before_its_lock_is_replaced(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    create = tempfile.mkdtemp

    def swept_at_first(**how: str) -> str:
        made.append(create(**how))
        if len(made) == 1:
            os.rmdir(made[0])
        return made[-1]

    monkeypatch.setattr(socket_directory.tempfile, "mkdtemp", swept_at_first)
    directory = SocketDirectory()
    assert len(made) == 2 and directory.path == Path(made[1]) and directory.path.exists()
    directory.remove()


def test_a_path_too_long_for_a_socket_is_not_used(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(make(base / ("long" * 20))))
    directory = SocketDirectory()
    assert directory.path.parent == Path("/tmp")
    directory.remove()
