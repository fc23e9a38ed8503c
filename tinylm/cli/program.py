"""What all command-line programs share: the parser, the streams, one-line errors, exit codes.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a bug: the traceback is shown |
| 2 | a mistake that the user can correct, on one line |
| 3 | training diverged |
| 128 + n | stopped by signal n: 130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1 on Linux, ...; training saves first |

Imports nothing heavy: `--help` must not wait for torch, pydantic or rich.
"""

import argparse
import difflib
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from tinylm.common.console import as_typed, lead_nowhere, log_to_stderr, open_streams, say, size
from tinylm.common.errors import (
    Diverged,
    UserError,
    first_line,
    is_out_of_memory,
    printable,
    unsupported_on_mps,
)
from tinylm.common.platform import STOP_SIGNALS, accept_ctrl_c

SHOW_ROWS = "print the first N rows as training sees them: text, borders of documents, targets"


class Parser(argparse.ArgumentParser):
    """The parser of a program or a command: one-line errors, in which control characters are
    escaped; the text after a flag as typed; ~ at the start of a path as the home folder.

    Abbreviated flags are rejected: a flag added later could change what they mean.

    Args:
        debug: declare --debug, the flag of a program.
        settings: of argparse.ArgumentParser.

    >>> parser = Parser()
    >>> _ = parser.add_argument("--separator")
    >>> parser.parse_args(["--separator", "---"]).separator
    '---'
    >>> parser.parse_args(["--separator=--"]).separator
    '--'
    """

    def __init__(self, *, debug: bool = True, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)
        if debug:
            self.add_argument("--debug", action="store_true", help="show the traceback of an error")
        # a shell does not expand ~ in --out=~/x
        self.register("type", Path, lambda text: Path(text).expanduser())

    def add_subparsers(self, **settings: Any) -> Any:
        """Commands are parsers of this kind, without --debug: it is given before the command."""
        return super().add_subparsers(parser_class=partial(Parser, debug=False), **settings)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """argparse drops a value `--`, which it takes for the end of the flags."""
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:
            return self._get_value(action, "--")
        return super()._get_values(action, arg_strings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Join a flag that takes a text and the word after it,
        which argparse refuses if it begins with a dash.
        """
        words = list(sys.argv[1:] if args is None else args)
        joined: list[str] = []
        while words:
            word = words.pop(0)
            action = self._option_string_actions.get(word)
            takes_text = action is not None and action.nargs is None and action.type is None
            if takes_text and words and words[0] not in ("--", *self._option_string_actions):
                word = f"{word}={words.pop(0)}"
            joined.append(word)
        return super().parse_known_args(joined, namespace)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Help and errors name commands as the user types them."""
        super()._print_message(as_typed(message) if message else message, file)

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with 2."""
        self.exit(2, f"error: {printable(message)}. See {self.prog} --help.\n")

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        """Parse flags and settings in any order; a setting that is written as a flag is an error
        with its name.
        """
        words = list(sys.argv[1:] if args is None else args)
        parsed, unknown = self.parse_known_intermixed_args(words, namespace)
        if unknown:
            self.error(
                f"unrecognized arguments: {' '.join(unknown)}{_setting_hint(unknown, words)}"
            )
        return parsed


def training_parser(program: str, config: str, description: str) -> tuple[Parser, Any]:
    """The parser, and its group of flags that do something before a run;
    at most one of those is given.

    Settings may appear between the flags: parse with `parse_intermixed_args`.
    """
    parser = Parser(
        prog=f"python {program}",
        usage=f"python {program} --config {config} [section.key=value ...]",
        description=description,
        epilog="Every setting: python -m tinylm config-reference writes docs/CONFIG_REFERENCE.md. "
        "Exit codes: 0 done, 2 a mistake to correct, 3 diverged, 130/143 stopped after saving.",
    )
    parser.add_argument("--config", required=True, help="YAML file with the settings")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that override the file"
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        metavar="PATH",
        type=Path,
        help="continue from this checkpoint, or the newest of this folder, instead of the "
        "newest of training.checkpoint_dir",
    )
    start.add_argument(
        "--no-resume",
        action="store_true",
        help="start a new run; the checkpoint folder must hold no checkpoints",
    )
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="resume although data, tokenizer or settings differ from the checkpoint's",
    )
    parser.add_argument(
        "--no-next", action="store_true", help="do not suggest what to run with the finished model"
    )
    group = parser.add_argument_group("before a run", "saves no checkpoint")
    before = group.add_mutually_exclusive_group()
    before.add_argument(
        "--print-config",
        action="store_true",
        help="print all settings, also those that have their default, as a config file",
    )
    before.add_argument("--show-rows", type=int, metavar="N", help=SHOW_ROWS)
    return parser, before


def _setting_hint(unknown: Sequence[str], words: Sequence[str]) -> str:
    """How the first unknown flag is written as a setting; "" if no setting has such a name."""
    from tinylm.config.messages import sections

    flag, equals, value = unknown[0].partition("=")
    name = flag.lstrip("-").replace("-", "_")
    keys = []
    for key, section in sections():
        keys += [f"{key}.{field}" for field in section.model_fields if key]
    settings = [key for key in keys if name in (key, key.rpartition(".")[2])]
    if not settings:
        names = [key.rpartition(".")[2] for key in keys]
        close = difflib.get_close_matches(name.rpartition(".")[2], names, 1, cutoff=0.7)
        settings = [key for key in keys if key.rpartition(".")[2] in close]
    if not settings:
        return ""
    if not equals:
        following = words[words.index(unknown[0]) + 1 :][:1]
        value = following[0] if following and following[0] not in unknown else "..."
    written = " or ".join(f"{key}={value}" for key in settings)
    return f". A setting is written without dashes: {written}"


def run_program(body: Callable[[], int], *, debug: bool) -> int:
    """Run a program's body and return its exit code, or the one of the error that ended it.

    With `debug` an error keeps its traceback. A closed output (`| head`) is not an error.
    """
    open_streams()
    log_to_stderr()
    try:
        os.getcwd()
    except FileNotFoundError:  # torch's libraries would end the process without a word of ours
        say("error: the working folder was deleted. Change to a folder that exists.")
        return 2
    # OpenMP threads spin while they wait, and slow down the thread they wait for as soon as
    # anything else runs: on 2 cores a training step took 15 times as long next to one busy process
    # (docs/LOG.md). Torch is not loaded yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Restored at the end: the process may be a notebook, which continues.
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    if previous[signal.SIGINT] != signal.SIG_IGN:  # a background shell ignores it: it stays ignored
        signal.signal(signal.SIGINT, stop_once)
    try:
        accept_ctrl_c()  # a parent process may have blocked it until now
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
    except (NotImplementedError, TypeError) as error:
        unsupported = unsupported_on_mps(error)
        if debug or unsupported is None:
            raise
        say(f"error: {unsupported}")
        return 2
    except (MemoryError, RuntimeError, OSError) as error:
        if not debug and is_out_of_memory(error):
            say(describe_lack_of_memory(error))
            return 2
        if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EIO):
            raise
        lead_nowhere(sys.stdout)
        say(
            f"error: the output could not be written: {error.strerror}. "
            "Free some space, or write it elsewhere."
        )
        return 2
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def describe_lack_of_memory(error: Exception) -> str:
    """The line that a program ends with, wherever the memory ran out."""
    used = ""
    if sys.platform.startswith("linux"):
        with open("/proc/self/statm", encoding="ascii") as file:
            used = f"; this process has {size(int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE'))}"
    return (
        f"error: out of memory: {first_line(error)}{used}. Close other programs, or make the model, "
        "the batch, the context or the number of samples smaller. Saved checkpoints are unchanged."
    )


def stop_once(signum: int, frame: Any) -> NoReturn:
    """Raise KeyboardInterrupt at the first Ctrl-C; a second one ends the process at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt
