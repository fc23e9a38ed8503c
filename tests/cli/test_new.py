"""`tinylm new`: a folder in which every command of the README finds its files."""

from pathlib import Path

import pytest

from tinylm.__main__ import main
from tinylm.common.app_folder import app_folder
from tinylm.common.console import COMMAND_VARIABLE
from tinylm.config.loader import load_config, require_here
from training.pipeline import read_stages


@pytest.fixture
def project(tmp_path, monkeypatch, capsys) -> Path:
    """A new folder, made by the installed command, as the working folder."""
    monkeypatch.setenv(COMMAND_VARIABLE, "tinylm")
    monkeypatch.chdir(tmp_path)
    assert main(["new", "my model"]) == 0
    next_command = "next: cd 'my model' && tinylm train --config config_smoke.yaml\n"
    assert capsys.readouterr() == ("my model\n", next_command)
    monkeypatch.chdir(tmp_path / "my model")
    return tmp_path / "my model"


def test_a_new_folder_has_configs_that_find_their_data(project):
    for name in ("config.yaml", "config_smoke.yaml", "config_finetune.yaml"):
        config = load_config(name)
        require_here(config, name)
        assert Path(config.data.dataset).is_file()
        assert f"tinylm {'finetune' if 'finetune' in name else 'train'} --config {name}" in (
            project / name
        ).read_text(encoding="utf-8")
    assert len(read_stages(Path("configs/align-smoke.yaml"))) == 4
    assert sorted(path.name for path in (project / "cases").iterdir()) == sorted(
        path.name for path in (app_folder() / "cases").iterdir()
    )
    # every preset, with the command that runs it as the user types it
    texts = [path.read_text(encoding="utf-8") for path in project.rglob("*.yaml")]
    assert len(texts) > 40
    assert not any("python " in text for text in texts)


@pytest.mark.slow
def test_new_completes_a_folder_and_overwrites_nothing(project, capsys, monkeypatch):
    (project / "data/tiny_corpus.txt").unlink()
    (project / "config.yaml").write_text("model: {n_layers: 3}\n", encoding="utf-8")
    monkeypatch.chdir(project.parent)
    assert main(["new", "my model"]) == 2
    assert capsys.readouterr().err == (
        "error: my model/config.yaml: already exists, with other content. Choose another folder.\n"
    )
    assert not (project / "data/tiny_corpus.txt").exists()
    (project / "config.yaml").unlink()
    monkeypatch.chdir(project)
    assert main(["new", "."]) == 0
    assert (project / "data/tiny_corpus.txt").exists()
    assert capsys.readouterr().err == "next: tinylm train --config config_smoke.yaml\n"


def test_new_cannot_be_made_inside_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert main(["new", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'file'}")
    assert error.count("\n") == 1
