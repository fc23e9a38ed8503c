"""What checkpoints there are: a table, or JSON for programs.

python list.py
python list.py --dir checkpoints/sft --sort val_loss
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylm.cli.program import Parser, run_program
from tinylm.common.errors import UserError, printable
from tinylm.common.units import size

if TYPE_CHECKING:
    from tinylm.checkpoint.info import CheckpointInfo

SORT_KEYS = ("step", "tokens", "train_loss", "val_loss", "parameters", "bytes", "created", "path")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python list.py",
        usage="python list.py [--dir checkpoints] [--sort val_loss] [--json]",
        description="List checkpoints and what they hold.",
    )
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path("checkpoints"),
        help="folder to look in (default: checkpoints)",
    )
    parser.add_argument(
        "--sort", choices=SORT_KEYS, default="step", help="column to sort by (default: step)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the program; the exit code comes back."""
    args = parse(argv)
    return run_program(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    """Read every checkpoint in the folder and show it; a damaged one is a row that says so."""
    from tinylm.checkpoint.info import describe

    if not os.path.isdir(
        args.dir
    ):  # os.path, unlike pathlib, has an answer for a name that is too long
        raise UserError(
            f"{printable(args.dir)}: no such folder. Train a model first: python train.py --config config_smoke.yaml"
        )
    sound: list[CheckpointInfo] = []
    damaged: list[tuple[Path, str]] = []
    for path in sorted(args.dir.glob("*.ckpt")):
        try:
            sound.append(describe(path))
        except UserError as error:  # damaged, or of a newer program
            damaged.append((path, str(error).removeprefix(f"{printable(path)}: ")))
    sound.sort(key=lambda info: sort_key(as_row(info)[args.sort]))
    if args.json:
        rows: list[dict[str, Any]] = [as_row(info) for info in sound] + [
            {"path": str(path), "damaged": why} for path, why in damaged
        ]
        print(json.dumps(rows, indent=2))
    elif not sound and not damaged:
        print(f"no checkpoints in {printable(args.dir)}")
    else:
        show(sound, damaged)
    return 0


def sort_key(value: Any) -> tuple[bool, Any]:
    """Orders values; what has none comes last."""
    return (True, 0) if value is None else (False, value)


def as_row(info: "CheckpointInfo") -> dict[str, Any]:
    """The columns as plain values."""
    from tinylm.checkpoint.info import info_row

    return info_row(info)


def show(sound: "list[CheckpointInfo]", damaged: list[tuple[Path, str]]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("file", no_wrap=True)
    table.add_column("stage", no_wrap=True)
    for name in ("step", "tokens", "train_loss", "val_loss", "parameters", "shape", "size", "age"):
        table.add_column(name, justify="right", no_wrap=True)
    for info in sound:
        losses = [
            "-" if value is None else f"{value:.4f}" for value in (info.train_loss, info.val_loss)
        ]
        numbers = [
            f"{info.step}",
            f"{info.tokens:,}",
            *losses,
            f"{info.parameters:,}",
            info.shape,
            size(info.bytes),
            age(info.created),
        ]
        table.add_row(printable(info.path.name), info.stage, *numbers)
    # Into a pipe nothing is cut: a program or a person with a wide screen reads it.
    console = Console(width=None if sys.stdout.isatty() else 400)
    if sound:
        console.print(table, markup=False)
    for path, why in damaged:
        print(f"{printable(path.name)}  DAMAGED: {why}")


def age(created: float) -> str:
    """How long ago, for people."""
    seconds = max(0.0, time.time() - created)
    for limit, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= limit:
            return f"{seconds / limit:.0f}{unit}"
    return f"{seconds:.0f}s"


if __name__ == "__main__":
    sys.exit(main())
