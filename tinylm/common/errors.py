"""Mistakes that their user can mend, and how text from outside is shown without harm."""

import contextlib
import gzip
import importlib.util
import os
import re
import stat
import zlib
from collections.abc import Iterator, Mapping


class UserError(Exception):
    """A mistake in a config, a data file, a checkpoint or the machine's set-up that its user can mend.

    The message says where, what was expected, what was found and what to do next. Programs print it as one line
    ``error: ...`` and exit with 2; every other exception keeps its traceback, because it is a bug of ours.
    """


class Diverged(Exception):
    """The loss or the gradient stopped being a finite number; programs exit with 3."""


def printable(text: object) -> str:
    r"""`text` on one line, with control, bidirectional and unencodable characters shown as escapes.

    A file name, a config value or generated text must not be able to move a terminal's cursor or forge a log line.

    >>> printable("a\nb\x1b[31m")
    'a\\nb\\x1b[31m'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


@contextlib.contextmanager
def calling(names: Mapping[str, str]) -> Iterator[None]:
    """Turns the settings that an error names into what its user typed: the flags of a command, a part of a mixture.

    >>> with calling({"data.dataset": "--data"}):
    ...     raise UserError("data.dataset: a/b: not found. Check data.dataset_config.")
    Traceback (most recent call last):
    tinylm.errors.UserError: --data: a/b: not found. Check data.dataset_config.
    """
    try:
        yield
    except UserError as error:
        setting = re.compile(rf"(?<![\w./])({'|'.join(map(re.escape, names))})(?!\w)")
        raise UserError(setting.sub(lambda found: names[found[0]], str(error))) from error


@contextlib.contextmanager
def writing(path: object, setting: str) -> Iterator[None]:
    """Turn a refusal of the operating system to write `path` into a UserError that names the setting it came from."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{printable(path)}: cannot be written: {error.strerror}. Make room or change {setting}.") from None


def reason(error: OSError) -> str:
    """Why the operating system refused, in few words."""
    return "not found" if isinstance(error, FileNotFoundError) else printable(error.strerror or error)


def require_regular(path: str | os.PathLike[str]) -> None:
    """Raise a UserError for what cannot be read to its end: nothing there, a pipe, a device, a circle of links."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise UserError(f"{printable(path)}: {reason(error)}. Give the path of a file that can be read.") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{printable(path)}: not a regular file. Give the path of a file on disk.")


@contextlib.contextmanager
def reading(path: object) -> Iterator[None]:
    """Turn errors of the operating system and of gzip while `path` is read into UserErrors that name it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{printable(path)}: damaged or cut-off gzip data ({printable(error)}). Download or compress it again.") from None
    except OSError as error:
        raise UserError(f"{printable(path)}: {reason(error)}. Give a file that can be read.") from None


def require_package(name: str) -> None:
    """Raise a UserError where a package that only some need is not installed."""
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{name} is not installed, and this needs it. pip install {name}.")
