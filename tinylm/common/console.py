"""Terminal output: the streams, log lines on stderr, and tables and progress bars on top of rich.

Results go to stdout (`results_console`, `table`, `print_table`), everything else to stderr
(`log_to_stderr`, `progress_bar`). Numbers for people are formatted in `units.py`. rich is imported
only where something is drawn.
"""

import logging
import os
import sys
import unicodedata
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from tinylm.common.errors import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

OnProgress = Callable[[str, int, int], None]
"""called with what is counted ("bytes", "merges"), how many are done, and the total (0: unknown)"""

# Joiners inside emoji and many scripts: str.isprintable rejects them,
# but they cannot move the cursor.
JOINERS = "\u200c\u200d"
# Columns of a console that is not a terminal: enough for all our tables, so nothing is cut.
PIPE_WIDTH = 400
# A column of text in a table is not shortened below this.
TEXT_WIDTH = 12
# The loggers of this project; their children are named after the modules.
LOGGERS = ("tinylm", "training", "data", "model")


def open_streams() -> None:
    """Make stdout and stderr safe to write to: a closed one is discarded,
    a character it cannot encode is escaped.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (never closed)
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")


def lead_nowhere(stream: TextIO) -> None:
    """Discard all that is still written to a broken stream, also by Python's flush at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(line: str) -> None:
    """Write one line to stderr, if it is still open."""
    try:
        sys.stderr.write(f"{printable(line)}\n")
    except BrokenPipeError:
        lead_nowhere(sys.stderr)


class StderrHandler(logging.Handler):
    """Writes log records as plain lines to stderr, escaped by `say`."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def log_to_stderr() -> None:
    """Show what this project logs at INFO and above; other packages keep their own settings.

    Idempotent: a second call in the same process changes nothing.
    """
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        if not any(isinstance(handler, StderrHandler) for handler in logger.handlers):
            logger.addHandler(StderrHandler())


def readable(text: str) -> str:
    r"""`text` with its lines and tabs, but control and bidirectional characters as escapes.

    >>> readable("a\tb\n\x1b[31m\u202e")
    'a\tb\n\\x1b[31m\\u202e'
    """
    return "".join(
        c if c in "\n\t" or c in JOINERS or unicodedata.category(c) == "Zs" else printable(c)
        for c in text
    )


def results_console() -> "Console":
    """Stdout for results: colors on a terminal that has them; in a pipe plain text of any width.

    Text is never interpreted as markup, so values from files can be printed as they are.
    """
    from rich.console import Console

    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(width=width, markup=False, highlight=False)


def table(*columns: str, text: Collection[str] = ()) -> "Table":
    """An empty table without lines; add rows with `add_row`, print it with `print_table`.

    Args:
        columns: the headers; a table without a header has columns named "".
        text: the columns that hold text, such as paths and names: left-justified, and shortened
            where the terminal is too narrow. The others hold numbers: right-justified and never
            shortened.
    """
    from rich.table import Table

    made = Table(box=None, pad_edge=False, show_header=any(columns), header_style="bold")
    for column in columns:
        if column in text:
            made.add_column(column, overflow="ellipsis")
        else:
            made.add_column(column, justify="right", no_wrap=True)
    return made


def print_table(rows: "Table") -> None:
    """Print a table on stdout: whole in a pipe; on a narrow terminal text is shortened,
    and a number never is.

    If the numbers alone need more than the terminal has, the lines are wider than it.
    """
    from rich.measure import Measurement

    console = results_console()
    unlimited = console.options.update(width=PIPE_WIDTH)
    needed = 2 * (len(rows.columns) - 1)  # the spaces between columns
    for column in rows.columns:
        cells = [column.header, *column.cells]
        width = max(Measurement.get(console, unlimited, cell).maximum for cell in cells)
        shortened = console.is_terminal and not column.no_wrap
        needed += min(width, TEXT_WIDTH) if shortened else width
    console.width = max(console.width, needed)
    console.print(rows)


@contextmanager
def progress_bar() -> Iterator[OnProgress]:
    """A bar on stderr for each kind of work that is reported;
    nothing if stderr is not a terminal.
    """
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

    def on_progress(what: str, done: int, total: int) -> None:
        if not console.is_terminal:
            return
        if what not in tasks:
            bars.start()  # late: finished work leaves no empty line
            tasks[what] = bars.add_task(what)
        bars.update(tasks[what], completed=done, total=total or None)

    try:
        yield on_progress
    finally:
        if tasks:
            bars.stop()
