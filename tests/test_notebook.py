"""notebooks/first_model.ipynb is committed without outputs, and every cell of it runs in a kernel."""

import json
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "first_model.ipynb"
# What a copy of the project for a run does not need.
IGNORED = (".*", "__pycache__", "venv", "env", "checkpoints", "logs", "build", "dist", "tests")


def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_the_notebook_has_no_outputs():
    """Outputs would be a second text to keep correct, and pictures in every diff."""
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert len(code) >= 5
    assert [cell["id"] for cell in code if cell["outputs"] or cell["execution_count"]] == []


def test_the_links_of_the_notebook_have_targets():
    text = "".join("".join(cell["source"]) for cell in cells() if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) >= 4
    assert [link for link in links if not (NOTEBOOK.parent / link).exists()] == []


@pytest.mark.slow
def test_every_cell_of_the_notebook_runs(tmp_path):
    """In a real kernel, with fewer steps: training and fine-tuning end without an error, three cells
    draw, and the models write and answer.
    """
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat (requirements-dev.txt)")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient (requirements-dev.txt)")
    pytest.importorskip("ipykernel", reason="needs ipykernel (requirements-dev.txt)")
    project = tmp_path / "project"
    shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(*IGNORED))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    setup = next(cell for cell in notebook.cells if cell.id == "setup")
    setup.source, n_changed = re.subn(r"(?m)^(\w*STEPS) = \d+", r"\1 = 2", setup.source)
    assert n_changed == 2
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(project / "notebooks")}}
    )
    client.execute()  # raises at the first error, with its traceback
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    for name in ("train", "tune"):
        assert outputs[name][-1].data == {"text/plain": "0"}
    for name in ("curves", "validation", "attention"):
        assert "image/png" in outputs[name][-1].data
    printed = {}
    for name in ("sample", "score", "chat"):
        assert {output.name for output in outputs[name]} == {"stdout"}
        printed[name] = "".join(output.text for output in outputs[name])
    assert len(re.findall(r"(?m)^temperature \S+: Attention is", printed["sample"])) == 3
    assert len(re.findall(r"(?m)^' \w+' +\d+\.\d%   expected '.+$", printed["score"])) >= 5
    assert len(re.findall(r"(?m)^[A-Z].+[.?]  .*$", printed["chat"])) == 3
    assert (project / "checkpoints" / "notebook-sft" / "final.ckpt").exists()
    assert not (NOTEBOOK.parent / "checkpoints").exists()
