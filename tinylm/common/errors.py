"""Mistakes that their user can mend, and how text from outside is shown without harm."""

import contextlib
import gzip
import importlib.util
import os
import re
import stat
import zlib
from collections.abc import Iterator, Mapping


def printable(text: object) -> str:
    r"""`text` on one line, with control, bidirectional and unencodable characters shown as escapes.

    A file name, a config value or generated text must not be able to move a terminal's cursor or forge a log line.

    >>> printable("a\nb\x1b[31m")
    'a\\nb\\x1b[31m'
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in str(text)
    )


class UserError(Exception):
    r"""A mistake in a config, a data file, a checkpoint or the machine's set-up that its user can correct.

    Programs print it as one line, ``error: WHERE: PROBLEM. FIX.``, and exit with 2; every other exception
    keeps its traceback, because it is a bug of ours. Code reads the fields, never the message. Control
    characters are escaped here, so callers pass paths and values as they are.

    Args:
        where: the file, `file:line`, setting or flag; a tuple of parts is joined with ": ".
        problem: what was found and what was expected, without a final period.
        fix: what to do about it, without a final period.

    >>> str(UserError("training.lr", "must be above 0, got -1", "Set it to 3e-4"))
    'training.lr: must be above 0, got -1. Set it to 3e-4.'
    >>> str(UserError(("a\n.yaml:2", "training.lrr"), "no such setting", "Did you mean lr?"))
    'a\\n.yaml:2: training.lrr: no such setting. Did you mean lr?'
    """

    def __init__(self, where: object, problem: object = None, fix: str = ""):
        super().__init__(where, problem, fix)  # args: what an error takes through a worker process
        parts = where if isinstance(where, tuple) else (where,)
        self.where = tuple(printable(part) for part in parts)
        self.problem = None if problem is None else printable(problem)
        self.fix = printable(fix)

    def __str__(self) -> str:
        if self.problem is None:  # a whole message in one argument
            return ": ".join(self.where)
        return " ".join(
            [_sentence(": ".join((*self.where, self.problem))), _sentence(self.fix)]
        ).strip()

    def within(self, *where: object, fix: str = "") -> "UserError":
        """The same error with more context: `where` before its own, and `fix`, if given, in place of its own.

        >>> str(UserError("a.ckpt", "not found", "Give a file").within("training.init_from"))
        'training.init_from: a.ckpt: not found. Give a file.'
        """
        return type(self)((*where, *self.where), self.problem, fix or self.fix)


def _sentence(text: str) -> str:
    return text if not text or text[-1] in ".?!…" else f"{text}."


class Diverged(Exception):
    """The loss or the gradient stopped being a finite number; programs exit with 3."""


@contextlib.contextmanager
def calling(names: Mapping[str, str]) -> Iterator[None]:
    """Turns the settings that an error names into what its user typed: the flags of a command, a part of a mixture.

    >>> with calling({"data.dataset": "--data"}):
    ...     raise UserError("data.dataset: a/b: not found. Check data.dataset_config.")
    Traceback (most recent call last):
    tinylm.common.errors.UserError: --data: a/b: not found. Check data.dataset_config.
    """
    try:
        yield
    except UserError as error:
        setting = re.compile(rf"(?<![\w./])({'|'.join(map(re.escape, names))})(?!\w)")
        raise UserError(setting.sub(lambda found: names[found[0]], str(error))) from error


@contextlib.contextmanager
def writing(path: object, setting: str) -> Iterator[None]:
    """Turn an operating system's refusal to write `path` into a UserError that names the setting it comes from."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the operating system's, for example a failed download
            raise
        raise UserError(
            path, f"cannot be written: {error.strerror}", f"Free disk space or change {setting}"
        ) from error


def reason(error: OSError) -> str:
    """Why the operating system refused, in few words."""
    return (
        "not found" if isinstance(error, FileNotFoundError) else printable(error.strerror or error)
    )


def require_regular(path: str | os.PathLike[str]) -> None:
    """Raise a UserError for what cannot be read to its end: nothing there, a pipe, a device, a circle of links."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise UserError(
            f"{printable(path)}: {reason(error)}. Give the path of a file that can be read."
        ) from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{printable(path)}: not a regular file. Give the path of a file on disk.")


@contextlib.contextmanager
def reading(path: object) -> Iterator[None]:
    """Turn errors of the operating system and of gzip while `path` is read into UserErrors that name it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{printable(path)}: damaged or cut-off gzip data ({printable(error)}). Download or compress it again."
        ) from None
    except OSError as error:
        raise UserError(
            f"{printable(path)}: {reason(error)}. Give a file that can be read."
        ) from None


def require_package(name: str) -> None:
    """Raise a UserError where a package that only some need is not installed."""
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{name} is not installed, and this needs it. pip install {name}.")
