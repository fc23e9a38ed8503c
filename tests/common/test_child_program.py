"""A program that runs as a child: signals that come before it can handle them."""

import signal
import sys

import pytest

from tinylm.common.child_program import ChildProgram


@pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="only there the signal is blocked in the child alone",
)
def test_ctrl_c_waits_for_a_program_that_is_still_starting(tmp_path, capfd):
    """A signal before the first line would print a traceback of the imports; the exit code of SIGINT is 128 + 2."""
    program = "from tinylm.cli.program import run_program; import time; run_program(lambda: time.sleep(60), debug=False) == 130 or exit(1); exit(130)"
    code = ChildProgram(received=signal.SIGINT).run(
        [sys.executable, "-c", program], stdout=None, stderr=None
    )
    assert (code, capfd.readouterr().err) == (130, "\nstopped by Ctrl-C\n")
