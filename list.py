"""List the checkpoints in a folder and its subfolders: a table, or JSON for programs.

python list.py
python list.py --dir checkpoints/sft --sort val_loss
"""

import argparse
import sys
from pathlib import Path

from tinylm.cli.program import Parser, run_program

SORT_KEYS = ("step", "tokens", "train_loss", "val_loss", "parameters", "bytes", "created", "path")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python list.py",
        usage="python list.py [--dir checkpoints] [--sort val_loss] [--json]",
        description="List the checkpoints in a folder and its subfolders.",
    )
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path("checkpoints"),
        metavar="FOLDER",
        help="folder of checkpoints, with its subfolders (checkpoints)",
    )
    parser.add_argument(
        "--sort", choices=SORT_KEYS, default="step", help="column to sort by (step)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    arguments = parse(argv)
    return run_program(lambda: run(arguments), debug=arguments.debug)


def run(arguments: argparse.Namespace) -> int:
    """Import what reads checkpoints, after --help, and list them."""
    from tinylm.cli.list_checkpoints import list_checkpoints

    return list_checkpoints(arguments)


if __name__ == "__main__":
    sys.exit(main())
