"""What `list.py` does: read every checkpoint in a folder and its subfolders, and print a table,
or JSON.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinylm.checkpoint.info import CheckpointInfo, describe, info_row
from tinylm.common.console import size
from tinylm.common.errors import UserError, no_folder, printable
from tinylm.common.tables import Table, print_table


def list_checkpoints(arguments: argparse.Namespace) -> int:
    """Print the checkpoints below --dir, folder by folder; a damaged one is listed with the
    reason.
    """
    # os.path, because Path.is_dir raises an OSError if the name is too long.
    if not os.path.isdir(arguments.dir):
        raise UserError(
            arguments.dir,
            no_folder(arguments.dir),
            "Train a model first: python train.py --config config_smoke.yaml",
        )
    valid: list[CheckpointInfo] = []
    damaged: list[tuple[Path, str]] = []
    for path in sorted(arguments.dir.rglob("*.ckpt")):
        try:
            valid.append(describe(path))
        except UserError as error:  # damaged, or written by a newer version
            damaged.append((path, reason_without_path(error)))
    valid.sort(key=lambda info: (info.path.parent, none_last(info_row(info)[arguments.sort])))
    if arguments.json:
        rows = [info_row(info) for info in valid]
        rows += [{"path": str(path), "damaged": reason} for path, reason in damaged]
        print(json.dumps(rows, indent=2))
        return 0
    if not valid and not damaged:
        print(f"no checkpoints in {printable(arguments.dir)} and the folders in it")
    if valid:
        print_checkpoints(valid, arguments.dir)
    for path, reason in damaged:
        print(f"{printable(path.relative_to(arguments.dir))}  DAMAGED: {reason}")
    return 0


def reason_without_path(error: UserError) -> str:
    """The message of an error about a checkpoint, without the path that it begins with."""
    sentences = [": ".join((*error.where[1:], str(error.problem))), error.fix]
    return " ".join(f"{sentence}." for sentence in sentences if sentence)


def none_last(value: Any) -> tuple[bool, Any]:
    """A sort key that orders values and puts None after them."""
    return (True, 0) if value is None else (False, value)


def print_checkpoints(checkpoints: list[CheckpointInfo], folder: Path) -> None:
    """Print the table: a line for each file, with all its names and its path in `folder`."""
    columns = ("step", "tokens", "passes", "train_loss", "val_loss")
    columns += ("parameters", "shape", "size", "age")
    rows = Table(("file", "stage", *columns), text=("file", "stage", "shape"))
    for info, name in named_files(checkpoints, folder):
        rows.add_row(
            printable(name),
            printable(info.stage),
            str(info.step),
            f"{info.tokens:,}",
            passes_text(info),
            loss_text(info.train_loss),
            loss_text(info.val_loss),
            f"{info.parameters:,}",
            info.shape,
            size(info.bytes),
            age(time.time() - info.created),
        )
    print_table(rows, group=("stage", "shape", "parameters"))


def named_files(
    checkpoints: list[CheckpointInfo], folder: Path
) -> Iterator[tuple[CheckpointInfo, str]]:
    """Each file once, with all its names: `sft/step-000060.ckpt (final, last)`."""
    files: dict[tuple[int, int], list[CheckpointInfo]] = {}
    for info in checkpoints:
        status = info.path.stat()
        files.setdefault((status.st_dev, status.st_ino), []).append(info)
    for names in files.values():
        names.sort(key=lambda info: (not info.path.name.startswith("step-"), info.path))
        first, *others = (info.path for info in names)
        name = str(first.relative_to(folder))
        if others:
            name += f" ({', '.join(path.stem for path in others)})"
        yield names[0], name


def passes_text(info: CheckpointInfo) -> str:
    """The passes over the data, and over each source of a mixture; or a dash."""
    if info.passes is None:
        return "-"
    of_sources = " ".join(f"{passes:.2f}" for passes in info.source_passes)
    return f"{info.passes:.2f}" + (f" ({of_sources})" if of_sources else "")


def loss_text(loss: float | None) -> str:
    """A loss with four decimals, or a dash."""
    return "-" if loss is None else f"{loss:.4f}"


def age(seconds: float) -> str:
    """A time span in its largest unit.

    >>> age(200_000), age(7300), age(90), age(-1)
    ('2d', '2h', '2m', '0s')
    """
    seconds = max(0.0, seconds)  # clocks of two machines may differ
    for limit, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= limit:
            return f"{seconds / limit:.0f}{unit}"
    return f"{seconds:.0f}s"
