"""The library's own commands: `python -m tinylm COMMAND`.

A command is a function `add_NAME(commands)` that declares its arguments and a function `NAME(arguments) -> int` that
imports what it needs, makes one call and prints. Add the first to `main`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinylm.errors import UserError, printable
from tinylm.program import Parser, run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    parser = Parser(prog="python -m tinylm", description="Commands of the Tiny Transformer library.")
    # The commands are plain parsers: --debug stands before the command.
    commands = parser.add_subparsers(metavar="command", required=True, parser_class=argparse.ArgumentParser)
    add_config_reference(commands)
    arguments = parser.parse_args(argv)
    return run_program(lambda: arguments.run(arguments), debug=arguments.debug)


def add_config_reference(commands: Any) -> None:
    """Declare `config-reference`."""
    summary = "write the reference of all settings and their JSON schema for editors"
    command = commands.add_parser("config-reference", help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    command.add_argument("--folder", type=Path, default=Path("docs"), help="where the two files are (default: docs)")
    command.add_argument("--check", action="store_true", help="write nothing; fail if a file does not match the settings")
    command.set_defaults(run=config_reference)


def config_reference(arguments: argparse.Namespace) -> int:
    """Write, or check, the files that `tinylm/reference.py` makes."""
    from tinylm.reference import reference_files

    for name, text in reference_files().items():
        path = arguments.folder / name
        try:
            if not arguments.check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8", newline="\n")
            stale = path.read_bytes() != text.encode()
        except OSError as error:
            raise UserError(f"{printable(path)}: {error.strerror}. Give the folder of the reference with --folder.") from None
        if stale:
            raise UserError(f"{printable(path)}: does not match the settings in tinylm/config.py. Write it again: python -m tinylm config-reference.")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
