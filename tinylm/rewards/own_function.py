"""A reward that is a function of the user's own: `reward: my_rewards.py:score`.

    def score(prompts: list[str], answers: list[str], targets: list[str]) -> list[float]:
        return [float(answer == target) for answer, target in zip(answers, targets)]

It gets the answers of a batch at once and returns a number for each. It runs in a process of its
own, which is started because the config names the file and for no other reason: so that a function
that never returns can be ended. It is not a sandbox: the function may do what the user may.

Whatever is wrong with it is one error that names the row. A function that raises, or takes too
long, is called again with one answer at a time to find that row.
"""

import json
import math
import multiprocessing
import numbers
import os
import signal
import sys
import traceback
import types
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tinylm.common.errors import UserError
from tinylm.common.files import read_regular
from tinylm.common.platform import end_with_parent
from tinylm.rewards.answer import Answer, RewardError

# What the file imports at its start may take long.
START_SECONDS = 120.0
_FIX = "Correct the function; it gets (prompts, answers, targets) and returns a number for each"


# In place of the number of a row: the mistake is one of all answers together.
ALL = -1


class Failed(Exception):
    """A call without a usable result; `row` is the answer that it is about, if that is known."""

    def __init__(self, problem: str, row: int | None = None):
        super().__init__(problem)
        self.problem, self.row = problem, row


class OwnFunction:
    """The function, ready to be called; its process starts with the first call.

    Args:
        name: FILE.py:FUNCTION.
        max_seconds: longest time for the answers of one batch.
    """

    def __init__(self, name: str, max_seconds: float):
        path, _, self.function = name.rpartition(":")
        self.name, self.path, self.max_seconds = name, Path(path), max_seconds
        try:
            # Read once: what is fingerprinted is what runs.
            self.source = read_regular(self.path).decode("utf-8")
        except UserError as error:
            raise error.within("grpo.rewards") from None
        except UnicodeDecodeError:
            raise UserError(("grpo.rewards", path), "not UTF-8 text", "Save it as UTF-8") from None
        self._connection: Connection | None = None

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """The reward of each answer.

        Raises:
            RewardError: naming the file, what it did, and the row.
        """
        try:
            return self._call(answers)
        except Failed as failed:
            problem, row = failed.problem, failed.row
        if row is None and answers:
            problem, row = (problem, 0) if len(answers) == 1 else self._blame(answers, problem)
        if row == ALL:
            rows = f"{answers[0].location} to {answers[-1].location}"
            problem = f"{problem} for the {len(answers)} answers to {rows}"
        elif row is not None:
            answer = answers[row]
            problem = f"{problem} for the answer {shortened(answer.text)!r} to {answer.location}"
        raise RewardError(("grpo.rewards", self.name), problem, _FIX)

    def _blame(self, answers: Sequence[Answer], problem: str) -> tuple[str, int]:
        """The problem with the first answer that fails alone, and its number; if none does, the
        problem with all of them.
        """
        for number, answer in enumerate(answers):
            try:
                self._call([answer])
            except Failed as failed:
                return failed.problem, number
        return f"{problem}, with none of them alone,", ALL

    def _call(self, answers: Sequence[Answer]) -> list[float]:
        if self._connection is None:
            self._start()
        if not answers:
            return []
        request = {
            "prompts": [answer.prompt for answer in answers],
            "answers": [answer.text for answer in answers],
            "targets": [answer.target for answer in answers],
        }
        return self._request(request, self.max_seconds)

    def _start(self) -> None:
        # spawn: a fork of a process that runs threads can deadlock.
        context = multiprocessing.get_context("spawn")
        self._connection, remote = context.Pipe()
        arguments = (remote, str(self.path), self.source, self.function)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        remote.close()
        weakref.finalize(self, self._process.kill)
        self._request(None, START_SECONDS)

    def _request(self, request: Any, seconds: float) -> Any:
        """What the process answers; if it fails to answer it is killed, and the next call starts
        another.
        """
        assert self._connection is not None
        problem = f"took more than {seconds:g} seconds"
        try:
            self._connection.send_bytes(json.dumps(request).encode())
            if self._connection.poll(seconds):
                answer = json.loads(self._connection.recv_bytes())
                if "problem" in answer:
                    raise Failed(answer["problem"], answer["row"])
                return answer["values"]
        except (EOFError, OSError):
            problem = "ended its process"
        self._process.kill()
        self._connection = None
        raise Failed(problem)


def shortened(text: str, limit: int = 60) -> str:
    """The text, cut to `limit` characters.

    >>> shortened("abcdef", 4)
    'abcd…'
    """
    return text if len(text) <= limit else f"{text[:limit]}…"


# --- in the process -------------------------------------------------------------------------------


def _serve(connection: Connection, path: str, source: str, function: str) -> None:
    """Answer requests until the other side closes the connection; None loads the file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is handled by the program
    end_with_parent()
    os.dup2(2, 1)  # what the function prints must not be among the program's results
    score: Any = None
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        answer: dict[str, Any]
        try:
            if request is None:
                score = _load(path, source, function)
                answer = {"values": []}
            else:
                returned = score(request["prompts"], request["answers"], request["targets"])
                answer = {"values": checked(returned, len(request["answers"]))}
        except Failed as failed:
            answer = {"problem": failed.problem, "row": failed.row}
        # foreign code: whatever it raises, sys.exit() included, is its own fault
        except BaseException as error:
            answer = {"problem": _raised(error, path), "row": None}
        connection.send_bytes(json.dumps(answer).encode())


def _load(path: str, source: str, function: str) -> Any:
    """The function of the file, whose folder it can import from."""
    module = types.ModuleType(Path(path).stem)
    module.__file__ = path
    sys.modules[module.__name__] = module
    sys.path.insert(0, str(Path(path).resolve().parent))
    exec(compile(source, path, "exec"), module.__dict__)  # noqa: S102 the config names this file
    score = getattr(module, function, None)
    if not callable(score):
        raise Failed(f"the file has no function {function}")
    return score


def _raised(error: BaseException, path: str) -> str:
    """What was raised, and the last line of the file that was being run."""
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame.lineno for frame in frames if frame.filename == path]
    line = f" (line {own[-1]})" if own else ""
    return f"raised {type(error).__name__}{': ' if text else ''}{shortened(text, 200)}{line}"


def checked(returned: Any, n: int) -> list[float]:
    """What the function returned, as floats.

    Raises:
        Failed: it is not a list of `n` finite numbers.
    """
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, list | tuple):
        raise Failed(f"must return a list of {n} numbers, got {type(returned).__name__}", ALL)
    if len(values) != n:
        raise Failed(f"must return {n} numbers, one for each answer, got {len(values)}", ALL)
    for row, value in enumerate(values):
        if not isinstance(value, numbers.Real):
            raise Failed(f"must return numbers, got {shortened(repr(value))}", row)
        if not math.isfinite(value):
            raise Failed(f"must return finite numbers, got {float(value)}", row)
    return [float(value) for value in values]
