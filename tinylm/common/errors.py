"""Errors that the user can correct, each as one line,
and how text from outside is displayed safely.
"""

import gzip
import importlib.util
import os
import stat
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import BinaryIO


class UserError(Exception):
    r"""A mistake in a config, a data file, a checkpoint or the machine's setup
    that the user can correct.

    Programs print it as one line, ``error: WHERE: PROBLEM. FIX.``, and exit with 2; every other
    exception keeps its traceback, because it is a bug. Code reads the fields, never the message.
    Control characters are escaped here, so callers pass paths and values as they are.

    Args:
        where: the file, `file:line`, setting or flag; several parts are a tuple and are joined with
            ": ". A setting is a part by itself, so that `rename_settings` finds it.
        problem: what was found and what was expected, without a final period.
        fix: what to do about it, without a final period; `{}` in it are replaced by `settings`.
        settings: settings or values that `fix` mentions; `rename_settings` finds them too.

    >>> str(UserError("training.lr", "must be above 0, got -1", "Set it to 3e-4"))
    'training.lr: must be above 0, got -1. Set it to 3e-4.'
    >>> str(UserError(("a\n.yaml:2", "training.lrr"), "no such setting", "Did you mean lr?"))
    'a\\n.yaml:2: training.lrr: no such setting. Did you mean lr?'
    >>> str(UserError("a.jsonl", "has no key text", "Set {} to one of: body, id", "data.text_field"))
    'a.jsonl: has no key text. Set data.text_field to one of: body, id.'
    """

    def __init__(self, where: object, problem: object, fix: str = "", *settings: object):
        super().__init__(where, problem, fix, *settings)  # what pickle passes to another process
        parts = where if isinstance(where, tuple) else (where,)
        self.where = tuple(printable(part) for part in parts)
        self.problem = printable(problem)
        self.fix = printable(fix.format(*settings) if settings else fix)
        self._hint = (fix, *settings)

    def __str__(self) -> str:
        message = _sentence(": ".join((*self.where, self.problem)))
        return f"{message} {_sentence(self.fix)}".strip()

    def within(self, *where: object, fix: str = "") -> "UserError":
        """The same error with more context: `where` before its own, and `fix`, if given,
        in place of its own.

        >>> str(UserError("a.ckpt", "not found", "Give a file").within("training.init_from"))
        'training.init_from: a.ckpt: not found. Give a file.'
        """
        hint = (fix,) if fix else self._hint
        return type(self)((*where, *self.where), self.problem, *hint)

    def renamed(self, names: Mapping[str, str]) -> "UserError":
        """The same error with other names for settings, in `where` and in the settings of `fix`."""
        fix, *settings = self._hint
        where = tuple(names.get(part, part) for part in self.where)
        return type(self)(where, self.problem, fix, *(names.get(str(s), s) for s in settings))


class Diverged(Exception):
    """The loss or the gradient is no longer a finite number; programs exit with 3."""


def printable(text: object) -> str:
    r"""`text` on one line, with control, bidirectional and unencodable characters as escapes.

    A file name, a config value or generated text cannot move the terminal's cursor
    or forge a log line.

    >>> printable("a\nb\x1b[31m")
    'a\\nb\\x1b[31m'
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in str(text)
    )


def _sentence(text: str) -> str:
    return text if not text or text[-1] in ".?!…" else f"{text}."


@contextmanager
def rename_settings(names: Mapping[str, str]) -> Iterator[None]:
    """Replace the settings that a UserError names by what the user typed: a flag,
    or a part of a mixture.

    >>> with rename_settings({"data.dataset": "--data", "data.split": "--split"}):
    ...     raise UserError(("data.dataset", "a/b"), "not found", "Check {}", "data.split")
    Traceback (most recent call last):
    tinylm.common.errors.UserError: --data: a/b: not found. Check --split.
    """
    try:
        yield
    except UserError as error:
        raise error.renamed(names) from error


@contextmanager
def writing(path: object, setting: str) -> Iterator[None]:
    """Turn an operating system's refusal to write `path` into a UserError
    that names the setting it comes from.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the operating system's, for example a failed download
            raise
        problem = f"cannot be written: {error.strerror}"
        raise UserError(path, problem, "Free disk space or change {}", setting) from error


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Turn errors of the operating system and of gzip while `path` is read into UserErrors
    that name it.
    """
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problem = f"damaged or truncated gzip data ({error})"
        raise UserError(path, problem, "Download or compress it again") from None
    except OSError as error:
        raise UserError(path, reason(error), "Give a file that can be read") from None


def reason(error: OSError) -> str:
    """The operating system's reason, in a few words: not found, Permission denied."""
    if isinstance(error, FileNotFoundError):
        return "not found"
    return printable(error.strerror or error)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """`path`, open to read its bytes: how this program opens every file that it reads.

    Raises:
        UserError: it cannot be opened, or is not a regular file: a pipe would wait for a writer
            forever, and a device may have no end.
    """
    require_regular(path)  # before it is opened, which alone affects some devices
    return open(path, "rb", opener=_open_regular)


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file; a UserError if it cannot be read, or as `open_regular`."""
    with reading(path), open_regular(path) as file:
        return file.read()


def _open_regular(path: str, flags: int) -> int:
    """`os.open`, which returns at once from a pipe and checks the file that it opened,
    because another one may have got its name since the first check.
    """
    if sys.platform != "win32":
        flags |= os.O_NONBLOCK
    try:
        handle = os.open(path, flags)
    except OSError as error:
        raise _unreadable(path, error) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _irregular(path)
    return handle


def require_regular(path: str | os.PathLike[str]) -> None:
    """Raise a UserError unless `path` is a regular file: not for a pipe,
    a device or a circle of links. For files that another library opens; see `open_regular`.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise _unreadable(path, error) from None
    if not stat.S_ISREG(mode):
        raise _irregular(path)


def _unreadable(path: object, error: OSError | ValueError) -> UserError:
    why = reason(error) if isinstance(error, OSError) else error
    return UserError(path, why, "Give the path of a file that can be read")


def _irregular(path: object) -> UserError:
    return UserError(path, "not a regular file", "Give the path of a file on disk")


def require_package(name: str) -> None:
    """Raise a UserError if an optional package is not installed."""
    if importlib.util.find_spec(name) is None:
        raise UserError(name, "this package is needed and is not installed", f"pip install {name}")


@contextmanager
def catch_panics() -> Iterator[None]:
    """Turn a panic of a library in Rust (tokenizers) into a RuntimeError.

    Its PanicException is no Exception and can be imported from nowhere, so it is known by its name.
    Rust writes several lines about it to file descriptor 2, which is closed to it meanwhile.
    """
    with open(os.devnull, "wb") as nowhere:
        stderr = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise RuntimeError(first_line(error)) from None
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def first_line(error: BaseException) -> str:
    """The first line of another library's message, to be part of one of ours."""
    return printable(str(error).strip().partition("\n")[0]).rstrip(".") or type(error).__name__
