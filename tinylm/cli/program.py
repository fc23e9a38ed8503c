"""What all command-line programs share: the parser, the streams, one-line errors, exit codes.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a bug: the traceback is shown |
| 2 | a mistake that the user can correct, on one line |
| 3 | training diverged |
| 130, 143 | stopped by Ctrl-C or SIGTERM; training saves first |

Imports nothing heavy: `--help` must not wait for torch, pydantic or rich.
"""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from tinylm.common.console import lead_nowhere, log_to_stderr, open_streams, say
from tinylm.common.errors import Diverged, UserError, printable


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with one-line errors, in which control characters are escaped.

    Abbreviated flags are rejected: a flag added later could change what they mean.
    """

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with 2."""
        self.exit(2, f"error: {printable(message)}. See {self.prog} --help.\n")


def run_program(body: Callable[[], int], *, debug: bool) -> int:
    """Run a program's body and return its exit code, or the one of the error that ended it.

    With `debug` an error keeps its traceback. A closed output (`| head`) is not an error.
    """
    open_streams()
    log_to_stderr()
    # OpenMP threads spin while they wait, and slow down the thread they wait for as soon as anything
    # else runs: on 2 cores a training step took 15 times as long next to one busy process
    # (docs/LOG.md). Torch is not loaded yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    previous = signal.signal(signal.SIGINT, stop_once)
    try:
        if sys.platform != "win32":
            # A parent process may have blocked Ctrl-C until now (`ChildProgram`).
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return body()
    except (UserError, Diverged) as error:
        if debug:
            raise
        say(f"error: {' '.join(str(error).split())}")
        return 2 if isinstance(error, UserError) else 3
    except KeyboardInterrupt:
        # If Ctrl-C arrives while exec() runs (an import that creates a dataclass), CPython marks it
        # as unhandled and ends a program started with -m by the signal, whatever its exit code.
        # Another exec() clears the mark.
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
        say(
            f"error: the output could not be written: {error.strerror}. "
            "Free some space, or write it elsewhere."
        )
        return 2
    finally:
        signal.signal(signal.SIGINT, previous)


def stop_once(signum: int, frame: Any) -> NoReturn:
    """Raise KeyboardInterrupt at the first Ctrl-C; a second one ends the process at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt
