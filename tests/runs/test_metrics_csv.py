"""metrics.csv after damage and removals: nothing is dropped unsaid."""

import shutil
from pathlib import Path

import pytest

from tinylm.runs.metrics_csv import COLUMNS, MetricsFile, MetricsRow, read_columns

HEADER = ",".join(COLUMNS)
Log = pytest.LogCaptureFixture


def row(step: int) -> MetricsRow:
    return {**dict.fromkeys(COLUMNS), "step": step, "train_loss": step / 2}


def file_of(folder: Path, *lines: str) -> Path:
    path = folder / "metrics.csv"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def steps(path: Path) -> list[float]:
    return read_columns(path).get("step", [])


def line(step: int) -> str:
    return f"{step},1.0" + "," * (len(COLUMNS) - 2)


def test_a_missing_header_is_added_and_no_row_is_lost(tmp_path: Path, caplog: Log) -> None:
    path = file_of(tmp_path, line(1), line(2), line(3))
    MetricsFile(path, 2, keep_old=False).append(row(3))
    assert path.read_text(encoding="utf-8").splitlines()[0] == HEADER
    assert steps(path) == [1, 2, 3]
    assert caplog.messages == [f"{path} has no header line: one was added"]


def test_a_file_of_other_columns_is_kept_under_another_name(tmp_path: Path, caplog: Log) -> None:
    path = file_of(tmp_path, "time,loss", "1,2")
    MetricsFile(path, 2, keep_old=False).append(row(3))
    assert steps(path) == [3]
    kept = path.with_name("metrics.1.csv")
    assert kept.read_text(encoding="utf-8") == "time,loss\n1,2\n"
    assert caplog.messages == [f"{path} has other columns: kept as {kept}"]


def test_damaged_rows_are_counted(tmp_path: Path, caplog: Log) -> None:
    """A cut line and one of other numbers; later steps are written again and are no damage."""
    path = file_of(tmp_path, HEADER, line(1), "x,1.0,,,,,,,", line(9), "2,1.")
    MetricsFile(path, 2, keep_old=False)
    assert steps(path) == [1]
    assert caplog.messages == [f"{path}: damaged rows were removed (2)"]


def test_a_file_that_is_removed_in_mid_run_begins_again_with_its_header(
    tmp_path: Path, caplog: Log
) -> None:
    held: list[int] = []

    def hold() -> None:
        held.append(1)
        path.parent.mkdir(exist_ok=True)

    path = tmp_path / "logs" / "metrics.csv"
    metrics = MetricsFile(path, 0, keep_old=False, hold=hold)
    metrics.append(row(1))
    shutil.rmtree(path.parent)
    metrics.append(row(2))
    metrics.complete({**row(2), "val_loss": 3.0})
    assert read_columns(path)["val_loss"] == [3.0]
    assert path.read_text(encoding="utf-8").splitlines()[0] == HEADER
    assert caplog.messages == [f"{path} was removed during the run; a new one begins here"]
    assert len(held) == 3
