"""Windows and macOS, simulated by the names that they lack or have."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tinylm.checkpoint import format as checkpoint_format
from tinylm.common import platform
from tinylm.common.child_program import ChildProgram, forward_signals
from tinylm.common.files import write_atomic


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what Windows does not have, and forbid what it refuses."""
    for module, name in (
        (os, "O_DIRECTORY"),
        (os, "statvfs"),
        (signal, "pthread_sigmask"),
        (signal, "SIGKILL"),
    ):
        monkeypatch.delattr(module, name)
    monkeypatch.setattr(signal, "CTRL_C_EVENT", 0, raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    open_file, sync = os.open, os.fsync
    can_write = set()

    def open_windows(path: str, flags: int, *more: int) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        handle = open_file(path, flags, *more)
        if flags & (os.O_RDWR | os.O_WRONLY):
            can_write.add(handle)
        return handle

    def sync_windows(handle: int) -> None:
        if handle not in can_write:
            raise OSError(errno.EBADF, "Bad file descriptor")
        sync(handle)

    monkeypatch.setattr(os, "open", open_windows)
    monkeypatch.setattr(os, "fsync", sync_windows)


def test_files_and_checkpoints_are_written_without_handles_of_folders(
    windows: None, tmp_path: Path
) -> None:
    """A handle of a folder, and a sync of one that can only read, are errors there."""
    write_atomic(tmp_path / "a" / "text.txt", "text", "training.log_dir")
    assert (tmp_path / "a" / "text.txt").read_text(encoding="utf-8") == "text"
    state = {"format": "tinylm", "schema": checkpoint_format.SCHEMA, "weights": {}}
    checkpoint_format.write(tmp_path / "step-000001.ckpt", state)
    checkpoint_format.verify(checkpoint_format.link(tmp_path / "step-000001.ckpt", "last.ckpt"))


def test_a_refused_save_counts_free_bytes_without_statvfs(
    windows: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of a full disk has both numbers on every platform."""

    def full(*paths: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    # shutil has a branch for Windows, which this Python has not
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1234))
    with pytest.raises(checkpoint_format.UserError) as caught:
        checkpoint_format.write(tmp_path / "step-000001.ckpt", {"weights": {}})
    assert "No space left on device (about 0 bytes needed, 1234 free)" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_signals_are_neither_blocked_nor_forwarded_where_they_cannot_be(windows: None) -> None:
    """A console sends Ctrl-C to the child itself, which may save; SIGTERM can only end it."""
    with platform.ctrl_c_blocked():
        platform.accept_ctrl_c()
    platform.end_with_parent()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    platform.send_signal(child, signal.SIGINT)
    time.sleep(0.05)
    assert child.poll() is None
    platform.send_signal(child, signal.SIGTERM)
    assert child.wait(timeout=10) != 0


def test_a_child_program_starts_without_fork(
    windows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows refuses `preexec_fn`."""
    popen, given = subprocess.Popen, {}

    def start(command: list[str], **settings: object) -> "subprocess.Popen[bytes]":
        given.update(settings)
        return popen(command)

    monkeypatch.delattr(os, "fork")
    monkeypatch.setattr(subprocess, "Popen", start)
    child = ChildProgram()
    with forward_signals(child):
        assert child.run([sys.executable, "-c", "exit(7)"], stdout=None, stderr=None) == 7
    assert given["preexec_fn"] is None


def test_macos_empties_the_cache_of_the_drive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F_FULLFSYNC where there is one; on a file system that refuses it (a network drive), fsync."""
    calls = []
    monkeypatch.setattr(platform.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(platform.fcntl, "fcntl", lambda handle, what: calls.append(what))
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append("fsync"))
    platform.sync(tmp_path)
    assert calls == [51]

    def refuse(handle: int, what: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(platform.fcntl, "fcntl", refuse)
    platform.sync(tmp_path)
    assert calls == [51, "fsync"]
