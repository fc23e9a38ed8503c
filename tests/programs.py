"""Programs as processes of their own that do not import torch and Lightning again: tests that kill, stop and resume runs
start many, and most of their processor time would go there.

`Program` is `subprocess.Popen`, `run` is `subprocess.run`, but a command `[sys.executable, "train.py", ...]` (also
`-m NAME` and `-c CODE`) is forked from a process that has imported what programs import (tests/program_server.py).
To the test it is a child process as any other. Not the same: the seed of hashes (PYTHONHASHSEED) is that of the warm
process, as are its umask and limits, and its memory (ru_maxrss) begins with the imported modules. What has to be a
real start, because the test is about imports, memory, hashes or start-up itself, uses `subprocess`. Elsewhere than on
Linux all are real starts.
"""

import atexit
import ctypes
import inspect
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from tests.program_server import LENGTH, Request
from tinylm.common.platform import STOP_SIGNALS

ROOT = Path(__file__).parents[1]
PR_SET_CHILD_SUBREAPER = 36  # from linux/prctl.h
# Libraries read these when they are imported: a warm process for each set of values.
READ_BY_IMPORTS = (
    "CUDA", "HF_", "HOME", "HUGGINGFACE", "KMP", "LANG", "LC_", "LD_", "MALLOC", "MKL", "MPL", "NUMEXPR", "OMP", "OPENBLAS",
    "PYTHON", "PYTORCH", "TOKENIZERS", "TORCH_", "TRANSFORMERS", "XDG",
)  # fmt: skip
MOST_WARM_PROCESSES = 2
# Imports take 15 s of processor time on a busy machine, and its answer after them a millisecond.
ANSWER_SECONDS = 300
start_process = subprocess.Popen


class WarmProcess:
    """The process that forks programs for this one."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.owner = os.getpid()
        self.lock = threading.Lock()
        self.connection, theirs = socket.socketpair()
        with theirs:
            code = f"from tests.program_server import main; main({theirs.fileno()})"
            # A group of its own, so that no Ctrl-C ends it; the session of this process, so that
            # programs can be in the group of this one.
            self.process = start_process(
                [sys.executable, "-c", code],
                cwd=ROOT,
                env=environment,
                pass_fds=[theirs.fileno()],
                process_group=0,
                # Python asks once, at the start, whether a stream can seek: those of a program are mostly pipes.
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        atexit.register(self.close)

    def start(self, request: Request, descriptors: list[int]) -> int:
        """The process id of a new program, which is a child of this process."""
        content = pickle.dumps(request)
        prctl = ctypes.CDLL(None).prctl
        with self.lock:
            # Linux gives an orphan to its nearest ancestor that asks for orphans. This process asks only
            # while the program becomes its child: the workers of a killed program go to init.
            prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                read, write = os.pipe()
                with open(read, "rb", buffering=0) as reply:
                    try:
                        head = LENGTH.pack(len(content))
                        socket.send_fds(self.connection, [head], [*descriptors, write])
                        self.connection.sendall(content)
                    finally:
                        os.close(write)
                    if not select.select([reply], [], [], ANSWER_SECONDS)[0]:
                        self.process.kill()
                        raise RuntimeError(
                            "the program was not started. The warm process was killed: "
                            f"it gave no answer in {ANSWER_SECONDS} s"
                        )
                    pid = reply.read()
            finally:
                prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        if not pid:
            # Of a program that was not ready for its first line, the traceback is in its own stderr.
            ended = self.process.poll() is not None and self.process.stderr.read().decode()
            raise RuntimeError(f"the program was not started. The warm process has ended: {ended}")
        return int(pid)

    def close(self) -> None:
        """End it, in the process that started it."""
        atexit.unregister(self.close)
        if os.getpid() == self.owner:
            # Not only closed: a process that this one has forked may have the connection too.
            self.connection.shutdown(socket.SHUT_RDWR)
            self.connection.close()
            self.process.communicate()


seen: set[frozenset[tuple[str, str]]] = set()
warm_processes: dict[frozenset[tuple[str, str]], WarmProcess] = {}


def warm_process(environment: dict[str, str]) -> WarmProcess | None:
    """That of this process and these variables, started if it is worthwhile: none yet for the first
    program whose variables differ from those of the programs before it.
    """
    environment = {
        "OMP_WAIT_POLICY": "PASSIVE"
    } | environment  # as the programs set it before torch
    key = frozenset(
        (name, value) for name, value in environment.items() if name.startswith(READ_BY_IMPORTS)
    )
    found = warm_processes.pop(key, None)
    if found is None or found.owner != os.getpid() or found.process.poll() is not None:
        if warm_processes and key not in seen:
            seen.add(key)
            return None
        seen.add(key)
        found = WarmProcess(environment)
        for old in list(warm_processes)[: -MOST_WARM_PROCESSES + 1 or None]:
            warm_processes.pop(old).close()
    warm_processes[key] = found
    return found


class Program(subprocess.Popen):
    """A process as subprocess.Popen starts it, forked from a warm one where that is possible."""

    def _execute_child(self, *arguments: Any) -> None:
        given = inspect.signature(super()._execute_child).bind(*arguments).arguments
        command = given["args"] if isinstance(given["args"], (list, tuple)) else [given["args"]]
        command = [os.fsdecode(word) for word in command]
        is_plain = (
            not any(
                given[name]
                for name in ("executable", "preexec_fn", "pass_fds", "shell", "gid", "gids", "uid")
            )
            and given["umask"] == -1
        )
        cwd = os.fsdecode(given["cwd"] or os.getcwd())
        if not (sys.platform.startswith("linux") and is_plain and can_be_forked(command, cwd)):
            super()._execute_child(*arguments)
            return
        environment = dict(os.environ if given["env"] is None else given["env"])
        warm = warm_process(environment)
        if warm is None:
            super()._execute_child(*arguments)
            return
        pipes = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        request = Request(
            command[1:],
            cwd,
            environment,
            [n for n in STOP_SIGNALS if signal.getsignal(n) == signal.SIG_IGN],
            list(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
            process_group(given),
            os.getpid(),
        )
        descriptors = [number if pipe == -1 else pipe for number, pipe in enumerate(pipes)]
        self.pid = warm.start(request, descriptors)
        self._child_created = True
        self._close_pipe_fds(
            *(given[f"{name}{end}"] for name in ("p2c", "c2p", "err") for end in ("read", "write"))
        )


def process_group(given: dict[str, Any]) -> int | None:
    """Of a program, as `Request` has it; -1 is the group of this process."""
    if given["start_new_session"]:
        return None
    return os.getpgrp() if given["process_group"] == -1 else given["process_group"]


def can_be_forked(command: list[str], cwd: str) -> bool:
    """A file, a module or code for this interpreter, without other flags."""
    if command[0] != sys.executable or len(command) < 2 or not os.path.isdir(cwd):
        return False
    return command[1] in ("-m", "-c") or os.path.isfile(os.path.join(cwd, command[1]))


def run(
    command: list[Any],
    *,
    input: str | bytes | None = None,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **settings: Any,
) -> subprocess.CompletedProcess:
    """As subprocess.run, by `Program`."""
    if input is not None:
        settings["stdin"] = subprocess.PIPE
    if capture_output:
        settings |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Program(command, **settings) as process:
        try:
            out, err = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done
