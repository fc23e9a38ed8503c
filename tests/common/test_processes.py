"""Work shared between processes: order, memory, workers that are killed, and workers whose parent is killed."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from tinylm.common.errors import UserError
from tinylm.common.processes import MAX_WAITING, in_order

ROOT = Path(__file__).parents[2]


def is_worker() -> bool:
    return multiprocessing.parent_process() is not None


def squared(number: int) -> int:
    if is_worker():
        time.sleep(0.01)  # so that the results of this process are ready first
    return number * number


def refuse_seven(number: int) -> int:
    if number == 7:
        raise UserError("job", "seven")
    return number


def die_as_a_worker(number: int) -> int:
    if is_worker():
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_results_come_in_the_order_of_the_jobs(processes):
    assert list(in_order(squared, range(60), processes)) == [
        number * number for number in range(60)
    ]
    assert list(in_order(squared, [], processes)) == []


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_an_exception_of_a_job_is_raised(processes):
    for only in (0, 2):  # with a worker, the first jobs are its, the third is this process's
        with pytest.raises(UserError, match="seven"):
            list(
                in_order(
                    refuse_seven, [7 if number == only else 1 for number in range(20)], processes
                )
            )


@pytest.mark.slow
def test_jobs_are_taken_as_they_are_needed():
    """An endless stream has no last job; `MAX_WAITING` results per process may wait while one more job is running."""
    jobs = count()
    results = in_order(squared, jobs, 2)
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    assert next(jobs) <= 5 + 2 * MAX_WAITING + 1
    results.close()


@pytest.mark.slow
def test_a_killed_worker_is_an_error():
    with pytest.raises(
        UserError,
        match="^worker process: killed, possibly out of memory. Free memory or use fewer processes.$",
    ):
        list(in_order(die_as_a_worker, range(20), 2))


@pytest.fixture
def command(tmp_path) -> Iterator[subprocess.Popen]:
    """`encode` with a worker, busy for seconds, in its own process group."""
    (tmp_path / "a.txt").write_text("some words\n" * 3_000_000, encoding="utf-8")
    words = [
        "encode",
        "--data",
        tmp_path / "a.txt",
        "--tokenizer",
        "byte",
        "--out",
        tmp_path / "a.bin",
        "--processes",
        "2",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "tinylm", *words],
        cwd=ROOT,
        text=True,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None and process.stderr.readline().startswith(
        "encoding with 2 processes"
    )
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_workers_end_with_a_killed_parent(command):
    def running() -> list[str]:
        """The processes of the group that are not dead."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                state, _, group, *_ = (
                    (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                )
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(group) == command.pid and state != "Z":
                found.append(folder.name)
        return found

    deadline = time.monotonic() + 20
    while (
        len(running()) < 3 and time.monotonic() < deadline
    ):  # itself, the worker, and Python's resource tracker
        time.sleep(0.05)
    command.kill()
    while running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running() == []


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.2, 0.4, 0.8])
def test_ctrl_c_prints_three_lines_also_while_workers_start(command, seconds):
    """A terminal sends it to the whole group; a worker that is still importing would print a traceback."""
    time.sleep(seconds)
    os.killpg(command.pid, signal.SIGINT)
    _, stderr = command.communicate(timeout=60)
    assert (command.returncode, stderr) == (
        130,
        "interrupted; the same command with --resume continues from here\n\nstopped by Ctrl-C\n",
    )


def test_ctrl_c_in_exec_is_exit_code_130_too(tmp_path):
    """As in an import that makes a dataclass; with -m, CPython alone would end by the signal: -2."""
    program = """import sys
from tinylm.cli.program import run_program
sys.exit(run_program(lambda: exec("raise KeyboardInterrupt"), debug=False))
"""
    (tmp_path / "stopped.py").write_text(program, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "stopped"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "\nstopped by Ctrl-C\n")
