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
from collections.abc import Callable
from typing import Any, NoReturn

from tinylm.common.console import lead_nowhere, log_to_stderr, open_streams, say
from tinylm.common.errors import Diverged, UserError, printable


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
    log_to_stderr()
    # OpenMP's threads spin while they wait, and when anything else runs they keep the machine from the thread they wait
    # for: on 2 cores a training step took 15 times as long beside one busy process (docs/LOG.md). Torch is not loaded yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    before = signal.signal(signal.SIGINT, stop_once)
    try:
        if (
            sys.platform != "win32"
        ):  # what started this program may have put Ctrl-C off until now (`Children`)
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
        say(
            f"error: the output could not be written: {error.strerror}. Make room, or write it elsewhere."
        )
        return 2
    finally:
        signal.signal(signal.SIGINT, before)


def stop_once(signum: int, frame: Any) -> NoReturn:
    """The first Ctrl-C ends the work; a second one, while the program is on its way out, ends the process at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt
