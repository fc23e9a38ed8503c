"""A program that runs as a child: signals that come before it can handle them."""

import importlib
import os
import signal
import sys

import pytest

from tinylm.common import platform
from tinylm.common.child_program import ChildProgram, forward_signals
from tinylm.common.platform import STOP_SIGNALS


@pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="only there the signal is blocked in the child alone",
)
def test_ctrl_c_waits_for_a_program_that_is_still_starting(tmp_path, capfd):
    """A signal before the first line would print a traceback of the imports; the exit code of SIGINT is 128 + 2."""
    program = (
        "from tinylm.cli.program import run_program; import time; run_program(lambda: "
        "time.sleep(60), debug=False) == 130 or exit(1); exit(130)"
    )
    code = ChildProgram(received=signal.SIGINT).run(
        [sys.executable, "-c", program], stdout=None, stderr=None
    )
    assert (code, capfd.readouterr().err) == (130, "\nstopped by Ctrl-C\n")


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_every_stop_signal_reaches_the_child_as_it_is(number):
    """The child sends it to this process, which sends it back; the child's exit code is its number."""
    program = (
        "import os, signal, sys, time; "
        f"signal.signal({number:d}, lambda n, frame: os._exit(n)); "
        f"signal.pthread_sigmask(signal.SIG_UNBLOCK, {{{number:d}}}); "
        f"os.kill(os.getppid(), {number:d}); time.sleep(60)"
    )
    child = ChildProgram()
    with forward_signals(child):
        code = child.run([sys.executable, "-c", program], stdout=None, stderr=None)
    assert (code, child.received) == (number, number)


def test_an_ignored_signal_stays_ignored_while_a_child_runs():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        child = ChildProgram()
        with forward_signals(child):
            os.kill(os.getpid(), signal.SIGHUP)
        assert child.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_platform_without_a_signal_has_the_others(monkeypatch):
    """Windows has no SIGHUP, SIGUSR1, SIGUSR2 and SIGXCPU."""
    for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
        monkeypatch.delattr(signal, name)
    try:
        found = importlib.reload(platform).STOP_SIGNALS
    finally:
        monkeypatch.undo()
        importlib.reload(platform)
    assert found == (signal.SIGINT, signal.SIGTERM)
