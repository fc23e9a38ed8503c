"""Work shared between processes, with its results in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from tinylm.common.errors import UserError
from tinylm.common.platform import ctrl_c_blocked

Job = TypeVar("Job", bound=Any)
Result = TypeVar("Result")

# Jobs that are queued per worker, so that it never waits for the next one.
JOBS_AHEAD = 2
# Results per process that may wait for an earlier one.
MAX_WAITING = 8


def in_order(
    work: Callable[[Job], Result], jobs: Iterable[Job], processes: int, *, min_size: int = 0
) -> Iterator[Result]:
    """`work(job)` for each job, in the order of the jobs.

    This process works too, from the start, because the `processes` - 1 workers take half a second
    to begin; it works alone if the jobs are small (`limit_processes`). `work` is sent to each
    worker once. At most `MAX_WAITING` jobs per process, with their results, are in memory. An
    exception in `work` ends everything at once; an error that should be raised in the order of the
    jobs must be returned as a result.

    Raises:
        UserError: a worker process was killed.
    """
    jobs, processes = limit_processes(jobs, processes, min_size)
    if processes == 1:
        yield from map(work, jobs)
        return
    # spawn: a forked process can deadlock if this one has threads (torch's, tokenizers')
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(
        processes - 1, context, initializer=_start_worker, initargs=(work,)
    )
    waiting = deque[Future[Any]]()
    try:
        while True:
            n_running = sum(not future.done() for future in waiting)
            room = JOBS_AHEAD * (processes - 1) - n_running
            waiting.extend(_submit(executor, job) for job in islice(jobs, max(room, 0)))
            if not waiting:
                return
            if not waiting[0].done() and len(waiting) < MAX_WAITING * processes:
                own = list(islice(jobs, 1))  # empty if there are no more jobs
                waiting.extend(_done(work(job)) for job in own)
                if own:
                    continue
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "worker process", "killed, possibly out of memory", "Free memory or use fewer processes"
        ) from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def limit_processes(
    jobs: Iterable[Job], processes: int, min_size: int
) -> tuple[Iterator[Job], int]:
    """The jobs, and the number of processes to use:
    1 if their `size`s add up to less than `min_size`.
    """
    jobs = iter(jobs)
    first: list[Job] = []
    size = 0
    while processes > 1 and size < min_size:
        job = next(jobs, None)
        if job is None:
            break
        first.append(job)
        size += job.size
    return chain(first, jobs), processes if size >= min_size else 1


def _submit(executor: ProcessPoolExecutor, job: Any) -> Future[Any]:
    """Queue a job; the first one starts the workers.

    A terminal sends Ctrl-C to all processes of a command. Workers inherit the signal blocked,
    because one that is still importing would print a traceback; this process decides when they end.
    """
    with ctrl_c_blocked():
        return executor.submit(_run, job)


def _done(result: Result) -> Future[Result]:
    future = Future[Result]()
    future.set_result(result)
    return future


_work: Callable[[Any], Any]
"""in a worker: the function that it was started for"""


def _start_worker(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process uses one core
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _run(job: Any) -> Any:
    return _work(job)


def _exit_with_parent() -> None:
    """Without this, the workers of a killed process would wait for their next job forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
