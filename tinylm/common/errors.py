"""Errors that the user can correct, each as one line,
and how text from outside is displayed safely.
"""

import errno
import importlib
import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeGuard

# checkpoint.check is imported at its first use


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

    saves_first = False
    """whether a run saves its last whole step before this error ends it"""

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


class DamagedError(UserError):
    """A checkpoint file that was changed after it was written, cannot be read,
    or was not written by this program.
    """


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


# What torch says of an operator or a type of number that Apple's GPU does not have.
_NOT_ON_MPS = ("not currently implemented for the MPS device", "MPS framework doesn't support")


def unsupported_on_mps(error: Exception) -> UserError | None:
    """The error of one line for something that Apple's GPU cannot compute; None for other errors.

    >>> str(unsupported_on_mps(TypeError("the MPS framework doesn't support float64. Use float32")))
    "mps: the MPS framework doesn't support float64. Set the environment variable \
PYTORCH_ENABLE_MPS_FALLBACK=1 to compute it on the CPU, or choose the CPU: \
hardware.accelerator=cpu, or --device cpu."
    """
    if not any(words in str(error) for words in _NOT_ON_MPS):
        return None
    problem = first_line(error).partition(". ")[0]
    return UserError(
        "mps",
        problem,
        "Set the environment variable PYTORCH_ENABLE_MPS_FALLBACK=1 to compute it on the CPU, "
        "or choose the CPU: hardware.accelerator=cpu, or --device cpu",
    )


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


def write_error(path: object, setting: str, error: Exception) -> UserError:
    """The error to raise if `path`, which `setting` decides, cannot be written; see `why_unwritten`."""
    why, fix = why_unwritten(error)
    folder = os.path.dirname(os.path.abspath(str(path)))
    if getattr(error, "errno", None) is None and os.path.isdir(folder):
        why += f" ({shutil.disk_usage(folder).free:,} bytes are free there)"
    return UserError(path, f"cannot be written: {why}", fix, setting)


def why_unwritten(error: Exception) -> tuple[str, str]:
    """Why a write failed, and how to correct it; `{}` in that is the setting, flag or argument
    that names the file.

    Args:
        error: from the operating system, or from a library whose write the operating system refused
            without telling it why.
    """
    number = error.errno if isinstance(error, OSError) else None
    why = "the disk did not take all of it" if number is None else os.strerror(number)
    return why, _WRITE_FIXES.get(number, "Change {}")


_SPACE = "Free disk space or change {}"
_FILES = "Close other programs, or raise the limit with `ulimit -n 4096`"
_NOT_A_FOLDER = "Change {}, or move the file that is there"
# How to correct what the operating system refuses, by its number; `{}` is the setting.
_WRITE_FIXES = {
    None: _SPACE,
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: "Raise the limit with `ulimit -f unlimited`, or change {}",
    errno.EMFILE: _FILES,
    errno.ENFILE: _FILES,
    errno.EACCES: "Get the permission to write there, or change {}",
    errno.EPERM: "Get the permission to write there, or change {}",
    errno.EROFS: "Change {} to a folder that can be written",
    errno.EIO: "Check the disk, or change {}",
    errno.ENAMETOOLONG: "Shorten {}",
    errno.EEXIST: _NOT_A_FOLDER,
    errno.ENOTDIR: _NOT_A_FOLDER,
    errno.EISDIR: "Change {}, or move the folder that is there",
}
_READ_FIXES = {
    errno.EMFILE: _FILES,
    errno.ENFILE: _FILES,
    errno.EACCES: "Get the permission to read it",
    errno.EPERM: "Get the permission to read it",
    errno.EIO: "Check the disk, or restore the file from a backup",
}


def read_error(path: object, error: OSError) -> UserError:
    """The error to raise if `path` cannot be read."""
    fix = _READ_FIXES.get(error.errno or 0, "Give the path of a file that can be read")
    return UserError(path, reason(error), fix)


def reason(error: OSError) -> str:
    """The operating system's reason, in a few words: not found, Permission denied."""
    if isinstance(error, FileNotFoundError):
        return not_found(error.filename)
    return printable(error.strerror or error)


def not_found(path: object) -> str:
    """`not found`, for a relative path with the folder that it was looked for in."""
    return f"not found{looked_in(path)}"


def looked_in(path: object) -> str:
    """` in FOLDER` for a relative path, else nothing."""
    if not _is_path(path) or os.path.isabs(path):
        return ""
    try:
        return f" in {os.getcwd()}"
    except FileNotFoundError:
        return ": the working folder was deleted"


def no_folder(path: str | os.PathLike[str]) -> str:
    """The problem with a path where there is no folder."""
    return "not a folder" if os.path.lexists(path) else not_found(path)


def _is_path(value: object) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(value, str | os.PathLike)


def require_package(name: str) -> None:
    """Raise a UserError if an optional package is not installed."""
    if importlib.util.find_spec(name) is None:
        raise UserError(name, "this package is needed and is not installed", f"pip install {name}")


def require_optional(module: str, needed_for: object, package: str = "datasets") -> None:
    """Raise a UserError if a module that reading the file `needed_for` takes is not installed.

    Args:
        module: the name that is imported.
        needed_for: the file or dataset.
        package: what to install for it.
    """
    if importlib.util.find_spec(module) is None:
        raise _not_installed(module, needed_for, package)


def import_optional(module: str, needed_for: object, package: str = "datasets") -> Any:
    """A module that may not be installed; a UserError as `require_optional` if it is not."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if importlib.util.find_spec(module) is None:
            raise _not_installed(module, needed_for, package) from None
        problem = f"reading it needs {module}, which cannot be imported: {first_line(error)}"
        raise UserError(needed_for, problem, f"Install it: pip install {package}") from None


def _not_installed(module: str, needed_for: object, package: str) -> UserError:
    return UserError(needed_for, f"reading it needs {module}", f"Install it: pip install {package}")


def reject_lone_surrogates(text: str) -> None:
    """Raise a UserError if `text` has half a UTF-16 pair, which a UTF-8 file cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"the lone surrogate {text[error.start]} at position {error.start}"
        raise UserError(
            (),
            f"the text has {found}, which is half a character",
            "Remove it, or write the whole character",
        ) from None


# What torch says when a device has no memory left; only CUDA's error is a class of its own.
_NO_MEMORY = (
    "can't allocate memory",  # CPU
    "out of memory",  # CUDA, MPS
    "Invalid buffer size",  # MPS, for one tensor
    "CUBLAS_STATUS_ALLOC_FAILED",
    "bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, NumPy, torch or the operating system is a lack of memory.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"))
    True
    """
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in _NO_MEMORY)
    return isinstance(error, MemoryError)


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
    line = str(error).strip().partition("\n")[0].strip()
    return printable(line).rstrip(".") or type(error).__name__
