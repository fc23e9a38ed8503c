"""Terminal output: the streams, log lines on stderr, and progress bars on top of rich.

Results go to stdout (tables.py), everything else to stderr (`log_to_stderr`, `progress_bar`).
Numbers for people are formatted at the end; files have the raw numbers. rich is imported only where
something is drawn.
"""

import io
import logging
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tinylm.common.errors import printable

OnProgress = Callable[[str, int, int], None]
"""called with what is done ("encoding, bytes"), how many are done, and the total (0: unknown)"""

# Joiners inside emoji and many scripts: str.isprintable rejects them,
# but they cannot move the cursor.
JOINERS = "\u200c\u200d"
# The loggers of this project; their children are named after the modules.
LOGGERS = ("tinylm", "training", "data", "model")
# Set by the command tinylm, also for the programs that it starts: how it was typed.
COMMAND_VARIABLE = "TINYLM_COMMAND"
# The commands in our messages, and their names under tinylm where those differ.
COMMANDS = re.compile(
    r"\bpython\s+(?:-m\s+tinylm\b|(train|finetune|align|infer|list|eval_val|evaluate_checkpoints)\.py\b)"
)
RENAMED_COMMANDS = {"eval_val": "eval-val", "evaluate_checkpoints": "eval"}


def open_streams() -> None:
    """Make stdout and stderr safe to write to: a closed one is discarded,
    a character it cannot encode is escaped.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (never closed)
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook's takes every character
        sys.stdout.reconfigure(errors="backslashreplace")


def lead_nowhere(stream: TextIO) -> None:
    """Discard all that is still written to a broken stream, also by Python's flush at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(line: str) -> None:
    """Write one line to stderr, if it is still open."""
    if COMMAND_VARIABLE in os.environ:
        line = as_typed(line)
    try:
        sys.stderr.write(f"{printable(line)}\n")
    except BrokenPipeError:
        lead_nowhere(sys.stderr)


def as_typed(text: str) -> str:
    """`text` with its commands as this user types them, `tinylm train` for `python train.py`:
    a checkout has the programs, an installation has one command.

    >>> os.environ[COMMAND_VARIABLE] = "tinylm"
    >>> as_typed("python eval_val.py --ckpt a.ckpt, or python -m\\n  tinylm plot logs")
    'tinylm eval-val --ckpt a.ckpt, or tinylm plot logs'
    >>> del os.environ[COMMAND_VARIABLE]
    >>> as_typed("python train.py")
    'python train.py'
    """
    typed = os.environ.get(COMMAND_VARIABLE)
    if typed is None:
        return text

    def spell(found: re.Match[str]) -> str:
        program = found[1]
        return f"{typed} {RENAMED_COMMANDS.get(program, program)}" if program else typed

    return COMMANDS.sub(spell, text)


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


@contextmanager
def progress_bar() -> Iterator[OnProgress | None]:
    """A bar on stderr for each kind of work that is reported; None if stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed:,.0f}"),
        TimeElapsedColumn(),
    )
    bars = Bars(*columns, console=console)
    tasks: dict[str, Any] = {}

    def on_progress(what: str, done: int, total: int) -> None:
        if what not in tasks:
            bars.start()  # late: finished work leaves no empty line
            tasks[what] = bars.add_task(what)
        bars.update(tasks[what], completed=done, total=total or None)

    try:
        yield on_progress
    finally:
        if tasks:
            bars.stop()


# --- numbers, sizes and times for people ---


def short(number: float) -> str:
    """A number with three digits and a letter.

    >>> short(1_350_000), short(742), short(15_300), short(5.94e18)
    ('1.35M', '742', '15.3k', '5.94e+18')
    """
    if number >= 1e15:  # the FLOPs of a run: papers write them with an exponent
        return f"{number:.3g}"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """A time in hours, minutes and seconds, as far as they matter.

    >>> duration(192), duration(7384), duration(5.2)
    ('3m12s', '2h03m', '5s')
    """
    minutes, rest = divmod(int(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def size(n_bytes: int) -> str:
    """A number of bytes in decimal units.

    >>> size(2_500_000), size(900)
    ('2.5 MB', '900 B')
    """
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= limit:
            return f"{n_bytes / limit:.1f} {unit}"
    return f"{n_bytes} B"
