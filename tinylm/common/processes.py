"""Other processes: work shared out over several, its results in order; and a program run as a child of this one."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from tinylm.common.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")
Progress = Callable[[str, int, int], None]
"""Called with what is counted ("bytes", "merges"), how much is done, and of how much (0: not known)."""

# Jobs that lie in front of one helper, so that it never waits for the next.
AHEAD = 2
# Jobs a process whose results may wait for one before them.
KEPT = 8


def in_order(
    work: Callable[[Job], Result], jobs: Iterable[Job], processes: int
) -> Iterator[Result]:
    """`work(job)` for each job, in the order of the jobs.

    This process works too, from the first moment on: the `processes` - 1 helpers take half a second to start. `work` is sent
    to each of them once. Memory holds at most `KEPT` jobs a process, with their results. What `work` raises ends all at once, so
    an error that is to come in its turn is a result.

    Raises:
        UserError: a helper was killed.
    """
    if processes == 1:
        yield from map(work, jobs)
        return
    # spawn: a fork of a process that runs threads (torch's, tokenizers') can stand still for ever.
    executor = ProcessPoolExecutor(
        processes - 1, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(work,)
    )
    jobs, waiting = iter(jobs), deque[Future[Any]]()
    try:
        while True:
            room = AHEAD * (processes - 1) - sum(not future.done() for future in waiting)
            waiting.extend(_submit(executor, job) for job in islice(jobs, max(room, 0)))
            if not waiting:
                return
            if not waiting[0].done() and len(waiting) < KEPT * processes:
                mine = list(islice(jobs, 1))  # none where all jobs are given out
                waiting.extend(_done(work(job)) for job in mine)
                if mine:
                    continue
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a helper process was ended from outside, perhaps for want of memory. Free some, or use fewer processes."
        ) from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _submit(executor: ProcessPoolExecutor, job: Any) -> Future[Any]:
    """Hand a job over; the first one starts the helpers.

    A terminal sends Ctrl-C to all processes of a command. Helpers inherit the signal blocked, or else one that is still
    importing would die with a traceback; this process decides when they end.
    """
    if sys.platform == "win32":
        return executor.submit(_run, job)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return executor.submit(_run, job)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _done(result: Result) -> Future[Result]:
    future = Future[Result]()
    future.set_result(result)
    return future


_work: Callable[[Any], Any]
"""in a helper: what it was started for"""


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process is one core's work
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _run(job: Any) -> Any:
    return _work(job)


def _end_with_the_parent() -> None:
    """A killed parent would leave its helpers waiting for their next job for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# --- a program as a child ---------------------------------------------------------------------------------------------

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


@dataclass
class Children:
    """The one program that runs now, and the signal that came, which is handed on to it."""

    running: subprocess.Popen[bytes] | None = None
    received: int | None = None

    def note(self, number: int, frame: Any) -> None:
        """Take a signal; the program that gets it saves and ends by itself, and at a second one it ends at once."""
        again, self.received = self.received is not None, self.received or number
        if self.running is not None:
            self._end(self.running, signal.SIGKILL if again else self.received)

    @staticmethod
    def _end(process: subprocess.Popen[bytes], number: int) -> None:
        # The programs save at SIGINT and SIGTERM.
        process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    def run(self, command: Sequence[str], *, stdout: Any, stderr: Any) -> int:
        """The exit code of one of our programs; as a shell says it where a signal ended it.

        It has a session of its own: a terminal's Ctrl-C goes to the whole group, and would reach it twice. Where this process is
        killed, Linux ends the command by SIGTERM.
        """
        bind = _bind_to_this_process if sys.platform.startswith("linux") else None
        self.running = subprocess.Popen(  # noqa: S603, PLW1509
            command, stdout=stdout, stderr=stderr, start_new_session=True, preexec_fn=bind
        )
        if self.received is not None:  # it came while the process was being made
            self._end(self.running, self.received)
        code = self.running.wait()
        self.running = None
        return 128 - code if code < 0 else code


def _bind_to_this_process() -> None:
    # Ctrl-C waits until the program can take it (`run_program`): an interpreter that is still starting would die of it with a traceback.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def signals_to(children: Children) -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and a closed terminal end the program that runs, and us after it; what is ignored (nohup) stays so."""
    heard = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    before = {number: signal.signal(number, children.note) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
