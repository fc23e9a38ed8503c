"""list.py: valid and damaged checkpoints as a table and as JSON."""

import json
from pathlib import Path

import pytest

import list as program
from tests.checkpoint.test_checkpoint import make_state
from tinylm.checkpoint import format as checkpoint_format


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Steps 3 and 10, where 10 has the lower val_loss, and a damaged file."""
    checkpoint_format.write(tmp_path / "step-000003.ckpt", make_state(3, val_loss=2.0))
    checkpoint_format.write(tmp_path / "step-000010.ckpt", make_state(10, val_loss=1.0))
    (tmp_path / "broken.ckpt").write_bytes(b"x" * 500)
    return tmp_path


def test_the_table_has_one_line_per_checkpoint(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sorted by step; a damaged file has its own line, and the exit code is 0."""
    assert program.main(["--dir", str(folder)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == [
        "file",
        "stage",
        "step",
        "tokens",
        "passes",
        "train_loss",
        "val_loss",
        "parameters",
        "shape",
        "size",
        "age",
    ]
    assert lines[1][:6] == ["step-000003.ckpt", "pretrain", "3", "30", "-", "2.5000"]
    assert lines[1][6:8] == ["2.0000", "3,896"]
    assert lines[2][:4] == ["step-000010.ckpt", "pretrain", "10", "100"]
    assert lines[3][:2] == ["broken.ckpt", "DAMAGED:"]
    assert len(lines) == 4


@pytest.mark.parametrize(("key", "steps"), [("step", [3, 10]), ("val_loss", [10, 3])])
def test_json_is_sorted_and_complete(
    folder: Path, capsys: pytest.CaptureFixture[str], key: str, steps: list[int]
) -> None:
    """Raw numbers; a damaged file has the reason instead."""
    assert program.main(["--dir", str(folder), "--json", "--sort", key]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in rows[:2]] == steps
    assert rows[2]["path"].endswith("broken.ckpt") and "damaged" in rows[2]
    assert {
        "tokens",
        "train_loss",
        "val_loss",
        "parameters",
        "bytes",
        "created",
        "stage",
        "shape",
    } <= rows[0].keys()


def test_a_checkpoint_without_the_sort_key_is_last(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run without validation has no val_loss."""
    checkpoint_format.write(folder / "step-000001.ckpt", make_state(1))
    assert program.main(["--dir", str(folder), "--json", "--sort", "val_loss"]) == 0
    assert [row["step"] for row in json.loads(capsys.readouterr().out)[:3]] == [10, 3, 1]


def test_a_missing_folder_is_one_error_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The state before the first training run."""
    assert program.main(["--dir", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.endswith(
        "none: not found. Train a model first: python train.py --config config_smoke.yaml.\n"
    )


def test_subfolders_are_listed_folder_by_folder_and_each_file_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All runs may lie in subfolders; hard links are names of one file."""
    (folder / "sft").mkdir()
    path = folder / "sft" / "step-000002.ckpt"
    checkpoint_format.write(path, make_state(2, stage="sft"))
    for name in ("last.ckpt", "final.ckpt"):
        checkpoint_format.link(path, name)
    (folder / "sft" / "bad.ckpt").write_bytes(b"x")
    assert program.main(["--dir", str(folder)]) == 0
    lines = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[1:]]
    own = ["step-000003.ckpt", "step-000010.ckpt", "sft/step-000002.ckpt (final, last)"]
    assert lines == [*own, "broken.ckpt", "sft/bad.ckpt"]
    assert program.main(["--dir", str(folder), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 7  # each name is a path


def test_an_empty_folder_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is not an error."""
    assert program.main(["--dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("no checkpoints in ")
