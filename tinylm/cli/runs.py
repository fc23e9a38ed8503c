"""`tinylm runs`: a table of all runs below a folder; `tinylm runs compare A B`: the settings in
which runs differ, and their curves in one picture.
"""

import argparse
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylm.cli.plot import save_figure
from tinylm.common.console import duration, short
from tinylm.common.errors import UserError, no_folder, printable
from tinylm.common.tables import Table, print_table

if TYPE_CHECKING:
    from tinylm.runs.run_folder import RunFacts, RunFolder

logger = logging.getLogger(__name__)

SUMMARY = "list runs, or compare some of them"
COMPARE = "compare"
COLUMNS = ("run", "stage", "step", "tokens", "passes", "val_loss", "at step", "time", "status")
COLUMNS += ("as of",)
# Settings that name a run or a folder differ without meaning.
NAMES = ("training.run_name", "training.checkpoint_dir", "training.log_dir", "data.cache_dir")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.usage = (
        "python -m tinylm runs [FOLDER] [--json]\n"
        "       python -m tinylm runs compare RUN RUN ... [--metric val_loss] [--out FILE]"
    )
    parser.description = (
        "List the runs in a folder and its subfolders, newest first; "
        "or compare runs: the settings that differ, and their curves in one picture."
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="FOLDER",
        help="folder of runs (logs); after the word compare: the folders of two or more runs",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--metric",
        default="val_loss",
        metavar="COLUMN",
        help="compare: the column of metrics.csv in the picture (val_loss)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("plots/compare.png"),
        metavar="FILE",
        help="compare: the picture, .png or .svg (plots/compare.png)",
    )


def run(arguments: argparse.Namespace) -> int:
    """List or compare, and return the exit code."""
    words = arguments.words
    if words[:1] == [COMPARE]:
        return compare([Path(word) for word in words[1:]], arguments)
    if len(words) > 1:
        fix = "Give one folder, or: python -m tinylm runs compare RUN RUN"
        raise UserError("runs", f"must have at most one folder, got {len(words)}", fix)
    return list_runs(Path(words[0] if words else "logs"), as_json=arguments.json)


def list_runs(root: Path, *, as_json: bool) -> int:
    """Print a line for each run below `root`, newest first."""
    from tinylm.runs.run_folder import read_run_folders

    if not root.is_dir():
        fix = "Train first, or give the folder in training.log_dir"
        raise UserError(root, no_folder(root), fix)
    runs = sorted(read_run_folders(root), key=lambda run: (-run.facts.updated, run.path))
    if as_json:
        rows = [{"path": str(found.path), **asdict(found.facts)} for found in runs]
        print(json.dumps(rows, indent=2))
        return 0
    if not runs:
        print(f"no runs in {printable(root)} and the folders in it")
        return 0
    print_runs(runs, [str(found.path.relative_to(root)) for found in runs])
    return 0


def print_runs(runs: Sequence["RunFolder"], names: Sequence[str]) -> None:
    """Print a line for each run."""
    table = Table(COLUMNS, text=("run", "stage", "status", "as of"))
    for found, name in zip(runs, names, strict=True):
        table.add_row(printable(name), *cells_of(found.facts))
    print_table(table)


def cells_of(facts: "RunFacts") -> list[str]:
    """The cells of one run but its name; a dash for what is not known."""
    return [
        printable(facts.stage or "-"),
        f"{facts.step}/{facts.max_steps}" if facts.max_steps else str(facts.step),
        short(facts.tokens),
        "-" if facts.passes is None else f"{facts.passes:.2f}",
        "-" if facts.best_val_loss is None else f"{facts.best_val_loss:.4f}",
        "-" if facts.best_step is None else str(facts.best_step),
        duration(facts.seconds) if facts.seconds else "-",
        printable(facts.status or "-"),
        date_of(facts.updated),
    ]


def date_of(seconds: float) -> str:
    """A time in seconds since 1970 as a local date and time."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else "-"


def compare(folders: list[Path], arguments: argparse.Namespace) -> int:
    """Print the settings that differ and the results of runs, and draw their curves."""
    from tinylm.runs.plots import QUANTITIES, draw, read_metrics
    from tinylm.runs.run_folder import CONFIG, read_run_folder

    if len(folders) < 2:
        fix = "python -m tinylm runs compare logs/a logs/b"
        raise UserError("runs compare", f"needs two or more runs, got {len(folders)}", fix)
    if arguments.metric not in QUANTITIES:
        names = ", ".join(QUANTITIES)
        raise UserError("--metric", f"must be one of {names}, got {arguments.metric!r}")
    if arguments.out.suffix not in (".png", ".svg"):
        raise UserError("--out", f"must end with .png or .svg, got {arguments.out}")
    for folder in folders:
        if not (folder / "metrics.csv").is_file():
            fix = "Give folders of runs: python -m tinylm runs lists them"
            raise UserError(folder, "no run is here (no metrics.csv)", fix)
    names = list(map(str, folders))
    print_runs([read_run_folder(folder) for folder in folders], names)
    print_differences([settings_of(folder / CONFIG) for folder in folders], names)
    curves = [read_metrics(folder / "metrics.csv") for folder in folders]
    if not any(len(curve.curve(arguments.metric)[0]) for curve in curves):
        logger.info("no run has a value in column %s: no picture", arguments.metric)
        return 0
    save_figure(draw(arguments.metric, curves), arguments.out)
    return 0


def settings_of(config: Path) -> dict[str, str]:
    """Dotted name of each setting -> its value; empty if the run has no config.yaml."""
    from tinylm.config.loader import load_config

    settings: dict[str, str] = {}
    if not config.is_file():  # of an earlier version
        return settings

    def add(values: dict[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                add(value, f"{prefix}{name}.")
            else:
                settings[prefix + name] = json.dumps(value, ensure_ascii=False)

    add(load_config(config).to_plain(), "")
    return settings


def print_differences(settings: Sequence[dict[str, str]], names: Sequence[str]) -> None:
    """Print the settings that are not the same in all runs."""
    table = Table(("setting that differs", *names), text=("setting that differs", *names))
    for key in dict.fromkeys(key for values in settings for key in values):
        cells = [values.get(key, "-") for values in settings]
        if len(set(cells)) > 1 and key not in NAMES:
            table.add_row(key, *map(printable, cells))
    print()
    if table.rows:
        print_table(table)
    else:
        print("no setting differs")
