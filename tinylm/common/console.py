import logging
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tinylm.common.errors import printable
from tinylm.common.processes import Progress

# Joiners inside emoji and many scripts: str.isprintable rejects them, and they move nothing.
JOINERS = "\u200c\u200d"


def open_streams() -> None:
    """Make stdout and stderr safe to write to: a closed one leads nowhere, and what its encoding lacks is escaped."""
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (open for the life of the process)
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")


def lead_nowhere(stream: TextIO) -> None:
    """Let what is still written to a broken stream go to waste, also what Python flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(line: str) -> None:
    """Put one line for people on stderr; nobody need be there to read it."""
    try:
        sys.stderr.write(f"{printable(line)}\n")
    except BrokenPipeError:
        lead_nowhere(sys.stderr)


class StderrHandler(logging.Handler):
    """Prints log records as plain lines on stderr, escaped by `say`."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def log_to_stderr() -> None:
    """Show what this project logs at INFO and above; other packages keep their own settings.

    Idempotent: a second call in the same process changes nothing.
    """
    for name in ("tinylm", "training", "data", "model"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        if not any(isinstance(handler, StderrHandler) for handler in logger.handlers):
            logger.addHandler(StderrHandler())


def readable(text: str) -> str:
    r"""`text` with its lines and tabs, and with control and bidirectional characters shown as escapes.

    >>> readable("a\tb\n\x1b[31m\u202e")
    'a\tb\n\\x1b[31m\\u202e'
    """
    return "".join(
        c if c in "\n\t" or c in JOINERS or unicodedata.category(c) == "Zs" else printable(c)
        for c in text
    )


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on stderr for each kind of work that is reported; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}"),
        TimeElapsedColumn(),
    )
    bars = Bars(*columns, console=console)
    tasks: dict[str, Any] = {}

    def report(what: str, done: int, total: int) -> None:
        if not console.is_terminal:
            return
        if what not in tasks:
            bars.start()  # not before: work that is done already shall leave no empty line
            tasks[what] = bars.add_task(what)
        bars.update(tasks[what], completed=done, total=total or None)

    try:
        yield report
    finally:
        if tasks:
            bars.stop()
