"""The first error of a run is the cause, found by the cheapest check; a refused run leaves nothing."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import finetune
import train
from tinylm import checkpoint as checkpoints
from training.callbacks import Metrics

Make = Callable[..., Path]
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def refused(program: Any, capsys: Capture, config: Path, *overrides: str) -> str:
    """The last line of a run that exits with 2."""
    capsys.readouterr()
    assert program.main(["--config", str(config), *overrides]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_missing_data_is_said_before_a_model_is_asked_of_the_hub(
    make_config: Make, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    monkeypatch.setattr("tinylm.common.hub.download", None)
    monkeypatch.chdir(tmp_path)
    config = make_config(data={"dataset": "gone.jsonl"}, lora={})
    before = names(tmp_path)
    for flags in ((), ("--show-rows", "1")):
        error = refused(finetune, capsys, config, "training.init_from=hf:owner/model", *flags)
        assert error == (
            f"error: data.dataset: gone.jsonl: not found in {tmp_path}. Give a file, a folder, "
            "a glob, or a Hugging Face name written owner/name."
        )
    assert names(tmp_path) == before, "neither a lock nor an empty folder"


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_file_of_other_content_is_named_before_the_model_is_opened(
    make_config: Make, tmp_path: Path, capsys: Capture, stage: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", encoding="utf-8")
    program = {"pretrain": train, "sft": finetune}[stage]
    error = refused(
        program,
        capsys,
        make_config(),
        f"data.dataset={path}",
        "training.init_from=hf:owner/model",
    )
    problem = "its content is a Git LFS pointer, not the file itself. Run: git lfs pull."
    assert error == f"error: {path}: {problem}"


@pytest.mark.parametrize(
    ("package", "settings", "message"),
    [
        ("wandb", {"training": {"loggers": ["wandb"]}}, "training.loggers: wandb is not installed"),
        ("pyarrow", {"data": {"dataset": "a.parquet"}}, "a.parquet: reading it needs pyarrow."),
        ("datasets", {"data": {"dataset": "a/b"}}, "a/b: reading it needs datasets. Install it: "),
    ],
)
def test_a_missing_package_is_said_before_a_text_is_encoded(
    make_config: Make,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: Patch,
    package: str,
    settings: dict[str, Any],
    message: str,
) -> None:
    """F8."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name == package else found(name)
    )
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").write_bytes(b"PAR1\0")
    config = make_config(**settings)
    before = names(tmp_path)
    assert refused(train, capsys, config).startswith(f"error: {message}")
    assert names(tmp_path) == before


def test_a_separator_that_does_not_occur_is_the_cause_of_an_empty_split(
    make_config: Make, tmp_path: Path, capsys: Capture
) -> None:
    r"""A shell leaves \n as two characters; the error is not about data.val_fraction."""
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n\n" * 99, encoding="utf-8")
    config = make_config()
    typed = r"data.document_separator=\n\n"
    assert refused(train, capsys, config, f"data.dataset={path}", typed) == (
        rf"error: data.document_separator: '\n\n' does not occur in {path}, so each .txt file is "
        "one document. Set data.document_separator to what divides documents; for the "
        r"""characters meant write data.document_separator=$'\n\n' (in YAML "\n\n")."""
    )


def test_a_path_beside_the_config_is_named(
    make_config: Make, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    """The config is started from another folder; its paths are relative to the working folder."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "configs").mkdir()
    config = make_config(name="configs/a.yaml", data={"dataset": "corpus.txt"})
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert refused(train, capsys, config) == (
        f"error: data.dataset: corpus.txt: not found in {tmp_path / 'elsewhere'}, but it is in "
        f"{tmp_path}. Run the command in {tmp_path}, or set data.dataset to the whole path."
    )
    assert names(tmp_path / "elsewhere") == []
    assert not (tmp_path / "checkpoints").exists()


def test_a_deleted_working_folder_is_one_line(
    make_config: Make, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    """G5: MKL, which torch loads, would end the process."""
    config = make_config()
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert refused(train, capsys, config) == (
        "error: the working folder was deleted. Change to a folder that exists."
    )
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_a_folder_that_is_removed_in_mid_run_is_made_again_with_its_lock(
    make_config: Make, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    """B10: the run ends with its result, and says what happened; the metrics have their header."""
    original = Metrics.log_if_due
    locked: list[bool] = []

    def remove(self: Metrics, module: Any, *rest: Any) -> None:
        original(self, module, *rest)
        if module.progress.step == 3:
            shutil.rmtree(tmp_path / "checkpoints")
            shutil.rmtree(tmp_path / "logs")
        if module.progress.step == 5:
            locked.append((tmp_path / "checkpoints" / ".lock").exists())
            locked.append((tmp_path / "logs" / "tiny" / ".lock").exists())

    monkeypatch.setattr(Metrics, "log_if_due", remove)
    assert train.main(["--config", str(make_config())]) == 0
    assert locked == [True, True]
    log = capsys.readouterr().err
    for folder in (tmp_path / "checkpoints", tmp_path / "logs" / "tiny"):
        assert f"{folder} was removed during the run; it is made again" in log
    checkpoints.format.verify(tmp_path / "checkpoints" / "final.ckpt")
    lines = (tmp_path / "logs" / "tiny" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert [line.partition(",")[0] for line in lines] == ["step", "4", "5", "6"]
    assert names(tmp_path / "logs" / "tiny") == [
        "config.yaml",
        "metrics.csv",
        "report.html",
        "run.json",
        "samples.jsonl",
    ]


@pytest.mark.slow
def test_a_file_in_place_of_the_folder_in_mid_run_is_one_line(
    make_config: Make, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    """B11."""
    original = Metrics.log_if_due
    folder = tmp_path / "checkpoints"

    def replace(self: Metrics, module: Any, *rest: Any) -> None:
        original(self, module, *rest)
        if module.progress.step == 3:
            os.rename(folder, tmp_path / "moved")
            folder.write_text("a file")

    monkeypatch.setattr(Metrics, "log_if_due", replace)
    assert refused(train, capsys, make_config()) == (
        f"error: {folder}: cannot be written: File exists. "
        "Change training.checkpoint_dir, or move the file that is there."
    )
    assert folder.read_text() == "a file"
