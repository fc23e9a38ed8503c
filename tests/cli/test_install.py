"""`pip install .` into an empty environment: the command trains in any folder, from a wheel that
puts nothing but tinylm into site-packages.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[2]
SHORT = ("training.max_steps=2", "training.val_batches=1", "model.d_model=32", "model.n_layers=1")
# As on macOS: a worker imports the modules that its functions are in, by name.
SPAWN = """
import multiprocessing
from tinylm.__main__ import console_script

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    console_script()
"""


def run(*command: object, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a command and return it; its stderr is shown if it fails."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=kept | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder that a wheel, built from a source distribution, was installed into."""
    if Version(importlib.metadata.version("setuptools")) < Version("77"):
        pytest.skip("needs setuptools 77 or newer: pip install -r requirements-dev.txt")
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(
            *(".*", "__pycache__", "venv", "env", "build", "dist", "*.egg-info", "*.ckpt"),
            *("checkpoints", "logs", "tests", "benchmarks", "docs"),
        ),
    )
    build = "from setuptools import build_meta; print(build_meta.build_{}('..'))"
    run(sys.executable, "-c", build.format("sdist"), cwd=source)
    [archive] = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder, filter="data")
    run(
        sys.executable,
        "-c",
        build.format("wheel"),
        cwd=folder / archive.name.removesuffix(".tar.gz"),
    )
    [wheel] = folder.glob("*.whl")
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet")
    run(*pip, "--target", folder / "site", wheel, cwd=folder)
    return folder / "site"


@pytest.mark.slow
@pytest.mark.long
def test_the_installed_command_trains_in_a_new_folder(installed, tmp_path):
    """Only tinylm is in site-packages, and no run writes there; workers are spawned, as on macOS."""
    names = {path.name for path in installed.iterdir()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"bin", "tinylm"}
    before = {path for path in installed.rglob("*") if "__pycache__" not in str(path)}
    command, site = installed / "bin" / "tinylm", {"PYTHONPATH": str(installed)}
    run(sys.executable, command, "new", "x", cwd=tmp_path, **site)
    folder = tmp_path / "x"
    (tmp_path / "spawned.py").write_text(SPAWN, encoding="utf-8")
    smoke = ("train", "--config", "config_smoke.yaml", *SHORT, "data.num_workers=2")
    trained = run(sys.executable, tmp_path / "spawned.py", *smoke, cwd=folder, **site)
    assert trained.stdout == "checkpoints/final.ckpt\n"
    assert "next: tinylm infer --ckpt checkpoints/final.ckpt" in trained.stderr
    tuned = run(
        *(sys.executable, command, "finetune", "--config", "config_finetune.yaml"),
        *("training.max_steps=2", "model.residual_dropout=0.1"),
        cwd=folder,
        **site,
    )
    assert "next: tinylm infer --ckpt checkpoints/sft/final.ckpt --chat" in tuned.stderr
    assert (folder / "checkpoints/sft/final.ckpt").is_file()
    assert before == {path for path in installed.rglob("*") if "__pycache__" not in str(path)}
