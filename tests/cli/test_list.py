"""list.py: what is there, also when some of it is damaged."""

import json
from pathlib import Path

import pytest

import list as program
from tests.checkpoint.test_checkpoint import make_state
from tinylm.checkpoint import format as checkpoint_format


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Steps 3 and 10, of which 10 has the lower val_loss, and a damaged one."""
    checkpoint_format.write(tmp_path / "step-000003.ckpt", make_state(3, val_loss=2.0))
    checkpoint_format.write(tmp_path / "step-000010.ckpt", make_state(10, val_loss=1.0))
    (tmp_path / "broken.ckpt").write_bytes(b"x" * 500)
    return tmp_path


def test_the_table_shows_every_checkpoint_on_a_line_of_its_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sorted by step; a damaged file is a row that says so, and the program ends well."""
    assert program.main(["--dir", str(folder)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == [
        "file",
        "stage",
        "step",
        "tokens",
        "train_loss",
        "val_loss",
        "parameters",
        "shape",
        "size",
        "age",
    ]
    assert lines[1][:7] == ["step-000003.ckpt", "pretrain", "3", "30", "2.5000", "2.0000", "3,896"]
    assert lines[2][:4] == ["step-000010.ckpt", "pretrain", "10", "100"]
    assert lines[3][:2] == ["broken.ckpt", "DAMAGED:"]
    assert len(lines) == 4


@pytest.mark.parametrize(("key", "steps"), [("step", [3, 10]), ("val_loss", [10, 3])])
def test_json_is_sorted_and_complete(
    folder: Path, capsys: pytest.CaptureFixture[str], key: str, steps: list[int]
) -> None:
    """The raw numbers; the damaged file has a reason instead."""
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


def test_a_checkpoint_without_the_sort_key_comes_last(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was never validated has no val_loss."""
    checkpoint_format.write(folder / "step-000001.ckpt", make_state(1))
    assert program.main(["--dir", str(folder), "--json", "--sort", "val_loss"]) == 0
    assert [row["step"] for row in json.loads(capsys.readouterr().out)[:3]] == [10, 3, 1]


def test_no_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the first training."""
    assert program.main(["--dir", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.endswith(
        "none: no such folder. Train a model first: python train.py --config config_smoke.yaml.\n"
    )


def test_an_empty_folder_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing there is not an error."""
    assert program.main(["--dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("no checkpoints in ")
