"""metrics.csv: one row per logged step. A resumed run continues the file; no step is in it twice.

    step,train_loss,val_loss,val_ppl,val_bpb,lr,grad_norm,tokens,tokens_per_s,...

An empty cell means that the step has no such value. Numbers are written exactly (`repr`).
"""

import csv
import io
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path

from tinylm.common.files import read_regular, writing

logger = logging.getLogger(__name__)

COLUMNS = (
    "step",
    "train_loss",
    "val_loss",
    "val_ppl",
    "val_bpb",
    "lr",
    "grad_norm",
    "tokens",
    "tokens_per_s",
)
# Measured by the clock or the machine: they differ between two runs that are otherwise equal.
MEASURED = ("tokens_per_s", "mfu", "data_wait", "peak_bytes")
MetricsRow = dict[str, float | int | None]


class MetricsFile:
    """metrics.csv of one run.

    Args:
        path: the file; its folder is created.
        last_step: the step that the run continues from; later rows of an existing file are removed.
        more_columns: the columns that only some stages have.
        keep_old: rename an existing file, which belongs to another run
            or to another branch of this run.
        hold: called before each write: takes the folder's lock again if the folder was removed.
    """

    def __init__(
        self,
        path: Path,
        last_step: int,
        *,
        more_columns: tuple[str, ...] = (),
        keep_old: bool,
        hold: Callable[[], object] = lambda: None,
    ):
        self.path, self.columns = path, (*COLUMNS, *more_columns)
        self.hold = hold
        with writing(path, "training.log_dir"):
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = []
            if path.exists():
                rows = self._rows_until(last_step)
                if keep_old and path.exists():
                    self._keep()
            self._write(rows)

    def append(self, row: MetricsRow) -> None:
        """Add a row."""
        with writing(self.path, "training.log_dir"):
            self._require_file()
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerow(self._as_text(row))

    def complete(self, row: MetricsRow) -> None:
        """Add the values of `row` to the last row if it has the same step, else append it."""
        step = row["step"] or 0
        with writing(self.path, "training.log_dir"):
            self._require_file()
            rows = self._rows_until(step)
            last = rows.pop() if rows and rows[-1]["step"] == str(step) else {}
            for name, text in self._as_text(row).items():
                if text or name not in last:
                    last[name] = text
            self._write([*rows, last])

    def _require_file(self) -> None:
        """Begin the file again if it was removed during the run, alone or with its folder."""
        self.hold()
        if not self.path.exists():
            logger.warning(f"{self.path} was removed during the run; a new one begins here")
            self._write([])

    def _as_text(self, row: MetricsRow) -> dict[str, str]:
        return {name: "" if row[name] is None else repr(row[name]) for name in self.columns}

    def _rows_until(self, step: int) -> list[dict[str, str]]:
        """The complete rows up to `step`; a resumed run writes the later ones again.

        Columns that only the file has are kept: it may be of other settings (`skipped_steps`).
        """
        text = read_regular(self.path).decode(errors="replace").replace("\0", "")
        lines = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
        names = lines.pop(0) if lines else list(self.columns)
        if not set(COLUMNS) <= set(names):
            if len(names) != len(self.columns):
                logger.warning(f"{self.path} has other columns: kept as {self._keep()}")
                return []
            logger.warning(f"{self.path} has no header line: one was added")
            lines.insert(0, names)
            names = list(self.columns)
        self.columns += tuple(name for name in names if name not in self.columns)
        rows, n_damaged = [], 0
        for row in lines:
            values = dict(zip(names, row, strict=False))
            if len(row) != len(names) or not values["step"].isdigit():
                n_damaged += 1
            elif int(values["step"]) <= step:
                rows.append(dict.fromkeys(self.columns, "") | values)
        if n_damaged:
            logger.warning(f"{self.path}: damaged rows were removed ({n_damaged})")
        return rows

    def _keep(self) -> Path:
        """Rename the file, which belongs to another run or is none of ours; its new name."""
        path = self._free_name()
        os.replace(self.path, path)
        return path

    def _write(self, rows: list[dict[str, str]]) -> None:
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)

    def _free_name(self) -> Path:
        number = 1
        while (path := self.path.with_name(f"metrics.{number}.csv")).exists():
            number += 1
        return path


def read_columns(path: Path) -> dict[str, list[float]]:
    """The columns of a metrics.csv, NaN for empty cells; incomplete rows are ignored.

    A file without complete rows gives no columns.
    """
    columns: dict[str, list[float]] = {}
    text = read_regular(path).decode(errors="replace").replace("\0", "")
    for row in csv.DictReader(io.StringIO(text, newline="")):
        is_ragged = None in row or None in row.values()  # more or fewer cells than the header
        if is_ragged or not (row.get("step") or "").isdigit():
            continue
        for name, cell in row.items():
            columns.setdefault(name, []).append(_number(cell))
    return columns


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan
