"""Programs of tests/programs.py are processes as subprocess starts them."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import programs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere they are the same"),
]
SHOW = """
import json, multiprocessing, os, signal, sys
print(json.dumps([
    sys.argv, sys.orig_argv, sys.path, os.getcwd(), dict(os.environ), __name__, __package__, __doc__, __annotations__,
    globals().get("__file__"), __spec__ and __spec__.name, type(__loader__).__name__, sorted(globals().keys() - {"__cached__"}),
    os.getppid(), os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid(), os.getpgid(0) == os.getpgid(os.getppid()),
    [str(signal.getsignal(n)).partition(" at ")[0] for n in sorted(signal.valid_signals())],
    sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())), sys.stdin.read(), sys.stdout.isatty(),
    sys.stdout.line_buffering, sys.stdout.write_through, sys.stderr.errors, sorted(os.listdir("/proc/self/fd")),
    multiprocessing.current_process().name,
], indent=1))
"""
ENDS = {
    "code": "import sys; print('out'); sys.exit(3)",
    "text": "import sys; sys.exit('text')",
    "error": "def f():\n    raise ValueError('wrong')\nf()",
    "error of a cause": "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise KeyError(1) from e",
    "syntax": "import sys\nif:",
    "kill": "import os; print('lost', end=''); os.kill(os.getpid(), 9)",
    "SIGTERM": "import os, time; os.kill(os.getpid(), 15); time.sleep(9)",
    "_exit": "import os; print('lost', end=''); os._exit(4)",
    "thread and atexit": "import atexit, threading, time\n"
    "atexit.register(print, 'atexit')\n"
    "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()\nprint('main')",
    "streams": "import sys\nfor s in (sys.stdout, sys.stderr):\n    s.reconfigure(errors='backslashreplace')\n"
    "    print(s.encoding, s.seekable(), s.newlines, file=sys.stderr)\nsys.stdout.write('\\udc80')",
    "hook": "import sys; sys.excepthook = lambda *error: print('hook', error[1]); 1 / 0",
    "workers": "import multiprocessing as m\nif __name__ == '__main__':\n"
    "    for way in ('fork', 'spawn'):\n        with m.get_context(way).Pool(1) as pool:\n"
    "            print(pool.map(abs, [-1, -2]))",
}


def command(form: str, code: str, folder: Path) -> list[str]:
    """The code as a command, to be run in the folder."""
    (folder / "program.py").write_text(code, encoding="utf-8")
    start = {"file": ["program.py"], "-c": ["-c", code], "-m": ["-m", "program"]}[form]
    return [sys.executable, *start, "word", "-c", "--flag=é"]


@pytest.mark.parametrize(
    ("form", "name"), [*(("file", name) for name in ENDS), ("-c", "error"), ("-m", "error")]
)
def test_a_program_ends_as_a_real_start_does(form: str, name: str, tmp_path: Path) -> None:
    """Exit code, output and traceback; the oracle is subprocess.run."""
    words = command(form, ENDS[name], tmp_path)
    found, expected = (
        run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        for run in (programs.run, subprocess.run)
    )
    assert vars(found) == vars(expected)


@pytest.mark.parametrize(
    ("form", "settings"),
    [("file", {}), ("-c", {"start_new_session": True}), ("-m", {"process_group": 0})],
)
def test_a_program_finds_what_a_real_start_finds(settings: dict, form: str, tmp_path: Path) -> None:
    """Arguments, paths, environment, names of __main__, groups, signals, streams and open files."""
    words = command(form, SHOW, tmp_path)
    environment = {**os.environ, "OF_THIS_TEST": "é"}
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        found, expected = (
            run(
                words,
                cwd=tmp_path,
                env=environment,
                input="given",
                capture_output=True,
                text=True,
                **settings,
            )
            for run in (programs.run, subprocess.run)
        )
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    assert found.stdout == expected.stdout
    assert (found.returncode, found.stderr) == (0, "")


@pytest.fixture
def own_warm_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No warm process of the tests before."""
    monkeypatch.setattr(programs, "warm_processes", {})
    yield
    for warm in programs.warm_processes.values():
        warm.close()


@pytest.mark.usefixtures("own_warm_process")
def test_a_program_is_forked_and_is_a_child_of_the_test() -> None:
    """Torch is imported already; poll, send_signal and wait work; killed, it leaves no other process."""
    code = "import sys; print('torch' in sys.modules, flush=True); input()"
    process = programs.Program(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "True\n"
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -9
    process.stdin.close()
    process.stdout.close()
    with pytest.raises(ChildProcessError):
        os.waitpid(process.pid, 0)


def test_orphans_of_a_killed_program_are_not_left_to_the_test() -> None:
    """They end with init: a test that waits until their /proc is gone would wait forever."""
    code = "import subprocess; p = subprocess.Popen(['sleep', '0.2']); print(p.pid, flush=True); p.wait()"
    process = programs.Program([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    orphan = int(process.stdout.readline())
    process.kill()
    process.communicate()
    with pytest.raises(ChildProcessError):
        os.waitpid(orphan, 0)


@pytest.mark.usefixtures("own_warm_process")
def test_the_warm_process_has_one_thread() -> None:
    """A thread would be missing in forked processes, and a lock that it held would be held forever."""
    code = "import os; print(os.getppid())"
    programs.run([sys.executable, "-c", code], capture_output=True, check=True)
    *_, warm = programs.warm_processes.values()
    assert len(os.listdir(f"/proc/{warm.process.pid}/task")) == 1


@pytest.mark.usefixtures("own_warm_process")
def test_a_warm_process_that_hangs_ends_the_test_with_a_message(monkeypatch) -> None:
    """The next program has a new warm process."""
    code = "print('started')"
    programs.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    *_, warm = programs.warm_processes.values()
    warm.process.send_signal(signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(programs, "ANSWER_SECONDS", 0.1)
        with pytest.raises(RuntimeError, match=r"not started\. .* gave no answer in 0\.1 s"):
            programs.run([sys.executable, "-c", code])
    assert warm.process.wait() == -signal.SIGKILL
    done = programs.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "started\n"
