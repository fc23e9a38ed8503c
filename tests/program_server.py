"""The warm process that forks programs for tests/programs.py: it has imported what they import, and runs no tensor
operation and no thread, so that a forked process is one that has just imported these modules.

    python -c "from tests.program_server import main; main(SOCKET)"      (started by tests/programs.py)
"""

import gc
import importlib
import os
import pickle
import pkgutil
import runpy
import signal
import socket
import struct
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from types import TracebackType

from tinylm.common.platform import STOP_SIGNALS

# What the programs import in a run; the modules of the stages are found in their folder. `training` is first because it
# keeps Lightning from importing libraries of metrics.
WARM = ("training.run", "training.sampling", "torch._dynamo", "numpy", "tokenizers")
LENGTH = struct.Struct("!Q")


@dataclass(frozen=True)
class Request:
    """A program to start: a command after the interpreter, and what it gets from the process that starts it."""

    command: list[str]
    cwd: str
    environment: dict[str, str]
    ignored_signals: list[int]
    blocked_signals: list[int]
    process_group: int | None
    """None: a session of its own; 0: a group of its own"""
    parent: int


def main(descriptor: int) -> None:
    """Import, then serve requests; returns in no process but a forked one, whose program has ended.

    The program runs below the interpreter's own main function, which ends it as any other:
    exit code or traceback, threads joined, atexit.
    """
    for name in WARM:
        importlib.import_module(name)
    for module in pkgutil.iter_modules(importlib.import_module("training.stages").__path__):
        importlib.import_module(f"training.stages.{module.name}")
    os.fsync = os.fstat  # no test cuts the power
    gc.collect()
    gc.freeze()  # a collection in a forked process would copy every page
    request = serve(socket.socket(fileno=descriptor))
    sys.excepthook = print_traceback_of_program
    run(request.command)


def serve(connection: socket.socket) -> Request:
    """Fork a process for each request and return it there; at the end of the connection exit."""
    while True:
        head, descriptors, _, _ = socket.recv_fds(connection, LENGTH.size, 4)
        if not head:
            os._exit(0)
        request: Request = pickle.loads(receive(connection, *LENGTH.unpack(head)))  # noqa: S301
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            for descriptor in descriptors:
                os.close(descriptor)
            continue
        between = os.getpid()
        if os.fork():
            os._exit(0)
        while os.getppid() == between:
            time.sleep(0.0005)
        if os.getppid() != request.parent:  # that process was killed meanwhile
            os._exit(1)
        connection.close()
        *streams, reply = descriptors
        prepare(request, streams)
        os.write(reply, str(os.getpid()).encode())
        os.close(reply)
        return request


def receive(connection: socket.socket, length: int) -> bytes:
    """The next `length` bytes."""
    content = b""
    while len(content) < length:
        part = connection.recv(length - len(content))
        if not part:  # the process that asks has been killed
            os._exit(0)
        content += part
    return content


def prepare(request: Request, descriptors: list[int]) -> None:
    """What happens between fork and exec of a new process, and in the first moments of its interpreter."""
    if request.process_group is None:
        os.setsid()
    else:
        os.setpgid(0, request.process_group)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request.cwd)
    os.environ.clear()
    os.environ.update(request.environment)
    tempfile.tempdir = None  # TMPDIR is read again
    for number in STOP_SIGNALS:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        is_ignored = number in request.ignored_signals
        signal.signal(number, signal.SIG_IGN if is_ignored else default)
    signal.pthread_sigmask(signal.SIG_SETMASK, request.blocked_signals)
    sys.stdout.reconfigure(line_buffering=os.isatty(1) and not sys.stdout.write_through)
    sys.modules["numpy"].random.seed()


def run(command: list[str]) -> None:
    """Run `-m NAME`, `-c CODE` or a file as the interpreter does, in the module `__main__`."""
    names = sys.modules["__main__"].__dict__
    for name in set(names) - {"__name__", "__builtins__", "__loader__", "__doc__"}:
        del names[name]
    names |= {"__spec__": None, "__package__": None, "__annotations__": {}}
    sys.orig_argv = [sys.executable, *command]
    if command[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = ["-m", *command[2:]]
        runpy._run_module_as_main(command[1])
        return
    if command[0] == "-c":
        sys.path[0] = ""
        sys.argv = ["-c", *command[2:]]
        code = compile(command[1], "<string>", "exec")
    else:
        sys.path[0] = os.path.dirname(os.path.realpath(command[0]))
        sys.argv = command
        names["__file__"] = os.path.abspath(command[0])
        names["__loader__"] = SourceFileLoader("__main__", names["__file__"])
        with open(command[0], "rb") as file:
            code = compile(file.read(), names["__file__"], "exec")
    exec(code, names)  # noqa: S102


def print_traceback_of_program(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Without the line that started this process, and without the frames of this file."""
    assert traceback is not None
    traceback = traceback.tb_next
    while traceback is not None and traceback.tb_frame.f_code.co_filename == __file__:
        traceback = traceback.tb_next
    sys.__excepthook__(kind, error.with_traceback(traceback), traceback)
