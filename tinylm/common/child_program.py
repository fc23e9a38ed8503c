"""One of our programs as a child process, with signals forwarded to it."""

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tinylm.common.platform import STOP_SIGNALS, end_with_parent, send_signal


@dataclass
class ChildProgram:
    """The program that runs now, if any, and the signal that was received."""

    process: subprocess.Popen[bytes] | None = None
    received: int | None = None

    def forward(self, number: int, frame: Any) -> None:
        """Handle a signal: the program saves and stops by itself;
        at a second signal it is killed.
        """
        again = self.received is not None
        self.received = self.received or number
        if self.process is not None:
            if again:
                self.process.kill()
            else:
                send_signal(self.process, number)

    def run(self, command: Sequence[str], *, stdout: Any, stderr: Any) -> int:
        """Run a command; its exit code, or 128 + the number of the signal that killed it.

        The command gets a session of its own, because a terminal sends Ctrl-C to the whole group
        and the command would receive it twice. If this process is killed, Linux stops the command
        with SIGTERM.
        """
        before_exec = _before_exec if hasattr(os, "fork") else None
        self.process = subprocess.Popen(  # noqa: S603, PLW1509
            command, stdout=stdout, stderr=stderr, start_new_session=True, preexec_fn=before_exec
        )
        if self.received is not None:  # the signal came while the process was being created
            send_signal(self.process, self.received)
        code = self.process.wait()
        self.process = None
        return 128 - code if code < 0 else code


def _before_exec() -> None:
    """In the child: block Ctrl-C, which the program unblocks when it can handle it
    (`run_program`), and end with the parent.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    end_with_parent("SIGTERM")


@contextmanager
def forward_signals(child: ChildProgram) -> Iterator[None]:
    """Let every stop signal stop the child, and then this process; ignored ones
    (nohup) stay ignored.
    """
    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, child.forward) for number in handled}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
