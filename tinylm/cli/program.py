"""What every command-line program here does alike: the parser, the streams, errors in one line, exit codes.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a bug: the traceback is shown |
| 2 | a mistake that its user can mend, in one line |
| 3 | training diverged |
| 130, 143 | stopped by Ctrl-C or SIGTERM; training saves first |
"""

import argparse
import errno
import os
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

from tinylm.errors import Diverged, UserError, printable
from tinylm.processes import Progress

# Joiners inside emoji and many scripts: str.isprintable rejects them, and they move nothing.
JOINERS = "\u200c\u200d"


class Parser(argparse.ArgumentParser):
    """Argparse with errors in one line, as everywhere else; what the user typed is shown without harm."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        self.exit(2, f"error: {printable(message)}. The flags: {self.prog} --help\n")


def run_program(body: Callable[[], int], *, debug: bool) -> int:
    """Run a program's body; its exit code, or that of the error it ended with, comes back.

    `debug` lets an error through with its traceback. A reader that closed our output (`| head`) is no error.
    """
    open_streams()
    # OpenMP's threads spin while they wait, and when anything else runs they keep the machine from the thread they wait
    # for: on 2 cores a training step took 15 times as long beside one busy process (docs/LOG.md). Torch is not loaded yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    before = signal.signal(signal.SIGINT, stop_once)
    try:
        if sys.platform != "win32":  # what started this program may have put Ctrl-C off until now (`Children`)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return body()
    except (UserError, Diverged) as error:
        if debug:
            raise
        say(f"error: {' '.join(str(error).split())}")
        return 2 if isinstance(error, UserError) else 3
    except KeyboardInterrupt:
        # Where Ctrl-C met the run of a text (an import that makes a dataclass), CPython remembers it as not handled and ends a program
        # begun with -m by the signal, whatever its exit code; the run of another text lets it forget.
        exec("")  # noqa: S102
        sys.stderr.write("\nstopped by Ctrl-C\n")
        return 130
    except BrokenPipeError:
        lead_nowhere(sys.stdout)
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO):
            raise
        lead_nowhere(sys.stdout)
        say(f"error: the output could not be written: {error.strerror}. Make room, or write it elsewhere.")
        return 2
    finally:
        signal.signal(signal.SIGINT, before)


def open_streams() -> None:
    """Make stdout and stderr safe to write to: a closed one leads nowhere, and what its encoding lacks is escaped."""
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (open for the life of the process)
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")


def lead_nowhere(stream: TextIO) -> None:
    """Let what is still written to a broken stream go to waste, also what Python flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def stop_once(signum: int, frame: Any) -> NoReturn:
    """The first Ctrl-C ends the work; a second one, while the program is on its way out, ends the process at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


def say(line: str) -> None:
    """Put one line for people on stderr; nobody need be there to read it."""
    try:
        sys.stderr.write(f"{printable(line)}\n")
    except BrokenPipeError:
        lead_nowhere(sys.stderr)


def readable(text: str) -> str:
    r"""`text` with its lines and tabs, and with control and bidirectional characters shown as escapes.

    >>> readable("a\tb\n\x1b[31m\u202e")
    'a\tb\n\\x1b[31m\\u202e'
    """
    return "".join(c if c in "\n\t" or c in JOINERS or unicodedata.category(c) == "Zs" else printable(c) for c in text)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on stderr for each kind of work that is reported; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f}"), TimeElapsedColumn())
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
