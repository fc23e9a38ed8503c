"""metrics.csv: one row per logged step. A resumed run continues the file; no step is in it twice.

    step,train_loss,val_loss,val_ppl,val_bpb,lr,grad_norm,tokens,tokens_per_s,...

An empty cell means that the step has no such value. Numbers are written exactly (`repr`).
"""

import csv
import io
import math
import os
from pathlib import Path

from tinylm.common.errors import read_regular, writing

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
MetricsRow = dict[str, float | int | None]


class MetricsFile:
    """metrics.csv of one run.

    Args:
        path: the file; its folder is created.
        last_step: the step that the run continues from; later rows of an existing file are removed.
        more_columns: the columns that only some stages have.
        keep_old: rename an existing file, which belongs to another run
            or to another branch of this run.
    """

    def __init__(
        self, path: Path, last_step: int, *, more_columns: tuple[str, ...] = (), keep_old: bool
    ):
        self.path, self.columns = path, (*COLUMNS, *more_columns)
        with writing(path, "training.log_dir"):
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = []
            if path.exists():
                rows = self._rows_until(last_step)
                if keep_old:
                    os.replace(path, self._free_name())
            self._write(rows)

    def append(self, row: MetricsRow) -> None:
        """Add a row."""
        with (
            writing(self.path, "training.log_dir"),
            open(self.path, "a", newline="", encoding="utf-8") as file,
        ):
            csv.DictWriter(file, self.columns).writerow(self._as_text(row))

    def complete(self, row: MetricsRow) -> None:
        """Add the values of `row` to the last row if it has the same step, else append it."""
        step = row["step"] or 0
        with writing(self.path, "training.log_dir"):
            rows = self._rows_until(step)
            last = rows.pop() if rows and rows[-1]["step"] == str(step) else {}
            for name, text in self._as_text(row).items():
                if text or name not in last:
                    last[name] = text
            self._write([*rows, last])

    def _as_text(self, row: MetricsRow) -> dict[str, str]:
        return {name: "" if row[name] is None else repr(row[name]) for name in self.columns}

    def _rows_until(self, step: int) -> list[dict[str, str]]:
        """The complete rows up to `step`; a resumed run writes the later ones again.

        Columns that only the file has are kept: it may be of other settings (`skipped_steps`).
        """
        text = read_regular(self.path).decode(errors="replace").replace("\0", "")
        reader = csv.DictReader(io.StringIO(text, newline=""))
        names, rows = reader.fieldnames or (), list(reader)
        if not set(COLUMNS) <= set(names):
            return []
        self.columns += tuple(name for name in names if name not in self.columns)
        kept = []
        for row in rows:
            is_complete = None not in row and None not in row.values()
            if is_complete and row["step"].isdigit() and int(row["step"]) <= step:
                kept.append(dict.fromkeys(self.columns, "") | row)
        return kept

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
        if None in row.values() or not (row.get("step") or "").isdigit():
            continue
        for name, cell in row.items():
            columns.setdefault(name, []).append(_number(cell))
    return columns


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan
