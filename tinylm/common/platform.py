"""What differs between operating systems, and nothing else does.

    signals        Windows has three of the stop signals, and cannot block one
    files          Windows has no handle of a folder; macOS's fsync does not reach the disk
    processes      Linux can end a process together with its parent

What a platform lacks is recognized by the missing name in `os`, `signal` or `fcntl`.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import subprocess

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_NAMES = (
    "SIGINT",  # Ctrl-C
    "SIGTERM",  # kill, and most schedulers
    "SIGHUP",  # the terminal was closed, or the ssh connection was lost
    "SIGUSR1",  # SLURM's --signal, submitit: the time limit is near
    "SIGUSR2",
    "SIGXCPU",  # the limit of CPU time is reached
    "SIGBREAK",  # Windows: Ctrl-Break
)
STOP_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


# --- signals ---


def signal_name(number: int) -> str:
    """The name of a signal for people.

    >>> signal_name(signal.SIGINT), signal_name(signal.SIGTERM)
    ('Ctrl-C', 'SIGTERM')
    """
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextmanager
def ctrl_c_blocked() -> Iterator[None]:
    """Processes that are started in this block do not receive Ctrl-C until they accept it:
    an interpreter that is still starting would print a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def accept_ctrl_c() -> None:
    """Receive Ctrl-C from now on, also if the process that started this one has blocked it."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def send_signal(process: "subprocess.Popen[bytes]", number: int) -> None:
    """Send a stop signal to a child process.

    A Windows console sends Ctrl-C to the child itself, and a child there can only be ended.
    """
    if not hasattr(signal, "CTRL_C_EVENT"):
        process.send_signal(number)
    elif number != signal.SIGINT:
        process.terminate()


# --- processes ---


def end_with_parent(name: str = "SIGKILL") -> None:
    """Linux: send this process a signal when its parent ends, also by kill -9."""
    if sys.platform.startswith("linux"):
        import ctypes  # not for `--help`

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, getattr(signal, name))


# --- files ---


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk.

    Windows has no handle of a folder: there, its file system alone decides when a name is on the
    disk.
    """
    has_folder_handles = hasattr(os, "O_DIRECTORY")
    if path.is_dir() and not has_folder_handles:
        return
    # Windows syncs only through a handle that can write.
    handle = os.open(path, os.O_RDONLY if has_folder_handles else os.O_RDWR)
    try:
        if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: its fsync leaves the data in the drive's cache
            with suppress(OSError):  # a network file system
                fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
                return
        os.fsync(handle)
    finally:
        os.close(handle)
