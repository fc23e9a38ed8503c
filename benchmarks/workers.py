"""One process for each implementation that a benchmark compares, so that none of them affects the
memory and the settings of another.

    with start_workers(Worker, names, lambda name, pipe: (work, (pipe, name))) as running:
        for worker in running:
            print(worker.ask("a message"))  # `work` receives it from its pipe, and answers

A worker ends when it receives None.
"""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar


@dataclass
class Worker:
    """The process of one implementation; a benchmark adds its times."""

    name: str
    process: BaseProcess
    pipe: Connection

    def ask(self, message: Any) -> Any:
        """Send a message and wait for the answer."""
        self.pipe.send(message)
        return self.receive()

    def receive(self) -> Any:
        """The next message of the process."""
        try:
            return self.pipe.recv()
        except EOFError:
            raise RuntimeError(
                f"the process of {self.name} failed; its traceback is above"
            ) from None

    def stop(self) -> None:
        """Stop the process; kill it if it does not stop by itself."""
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send(None)
        self.process.join(timeout=10)
        self.process.kill()


W = TypeVar("W", bound=Worker)


@contextlib.contextmanager
def start_workers(
    kind: type[W],
    names: list[str],
    job: Callable[[str, Connection], tuple[Callable[..., None], tuple[Any, ...]]],
) -> Iterator[list[W]]:
    """Start one process per name; stop them at the end.

    Args:
        kind: what each process is to the benchmark.
        names: of the implementations.
        job: the function that a process runs, which can be pickled, and its arguments.
    """
    context = multiprocessing.get_context("spawn")
    running: list[W] = []
    try:
        for name in names:
            ours, theirs = context.Pipe()
            target, arguments = job(name, theirs)
            process = context.Process(target=target, args=arguments, daemon=True)
            process.start()
            theirs.close()  # otherwise recv would not notice the end of the process
            running.append(kind(name, process, ours))
        yield running
    finally:
        for worker in running:
            worker.stop()


def memory_mb(name: str) -> float:
    """Memory of this process in 10^6 bytes: current (VmRSS) or peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ValueError(name)
