"""What the environment may decide about a run: the number and rank of its processes, and nothing else (FOUND K1)."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.utilities.rank_zero import rank_zero_only

import train
from tests import programs
from tests.training.test_train import (
    HARD,
    assert_same_run,
    elsewhere,
    interrupt_at,
    run,
    uninterrupted,  # noqa: F401  (a fixture)
)
from tinylm.checkpoint import format as checkpoint_format
from tinylm.common.errors import UserError
from tinylm.config.schema import HardwareConfig
from training.context import find_launcher

Make = Callable[..., Path]
Patch = pytest.MonkeyPatch
ROOT = Path(__file__).resolve().parents[2]
# A job of one task, as srun starts it.
ONE_TASK = {
    "SLURM_JOB_ID": "1234",
    "SLURM_NTASKS": "1",
    "SLURM_JOB_NAME": "train",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


def set_all(patch: Patch, variables: dict[str, str]) -> None:
    """Set environment variables for a test."""
    for name, value in variables.items():
        patch.setenv(name, value)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: Patch) -> None:
    """The tests themselves may run in a job."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "PL_TRAINER_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(rank_zero_only, "rank", 0)


# --- Lightning's own behavior under SLURM -----------------------------------------------------------------------------


@pytest.mark.slow
def test_in_a_slurm_job_a_stopped_run_is_resumed_from_our_checkpoint_alone(
    make_config: Make,
    uninterrupted: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: Patch,
) -> None:
    """SIGUSR1 in step 3, then the same command: equal to the last bit. A foreign hpc_ckpt_1.ckpt, which Lightning
    loads under SLURM, is not read, and nothing but the two folders of the run is written.
    """
    set_all(monkeypatch, ONE_TASK)
    config = make_config(**HARD)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    torch.save({"state_dict": {}}, work / "hpc_ckpt_1.ckpt")
    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3 * 2 + 2, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        assert run(config) == 128 + signal.SIGUSR1
    newest = checkpoint_format.latest_valid(tmp_path / "checkpoints")
    assert newest is not None and newest.name == "step-000003.ckpt"
    assert run(config) == 0
    assert_same_run(uninterrupted, tmp_path)
    assert [path.name for path in work.iterdir()] == ["hpc_ckpt_1.ckpt"]
    assert set(tmp_path.iterdir()) - set(before) == {tmp_path / "checkpoints", tmp_path / "logs"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"),
    [("LIMIT_TRAIN_BATCHES", "3"), ("MAX_STEPS", "2"), ("FAST_DEV_RUN", "1"), ("LOGGER", "True")],
)
def test_a_variable_for_lightnings_trainer_is_ignored_with_a_line(
    make_config: Make,
    tmp_path: Path,
    monkeypatch: Patch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str,
) -> None:
    monkeypatch.setenv(f"PL_TRAINER_{name}", value)
    monkeypatch.chdir(tmp_path)
    assert run(make_config()) == 0
    assert checkpoint_format.read(tmp_path / "checkpoints" / "final.ckpt")["step"] == 6
    line = f"ignored: the environment variable PL_TRAINER_{name}. Settings are in the config\n"
    assert line in capsys.readouterr().err
    assert not (tmp_path / "lightning_logs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_NTASKS": "2"},
        {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "interactive", "SLURM_PROCID": "0"},
        {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"},
    ],
)
def test_variables_without_tasks_for_the_run_leave_it_one_process(
    make_config: Make, tmp_path: Path, monkeypatch: Patch, variables: dict[str, str]
) -> None:
    """A shell that salloc opened; also a rank that some other program left: the run writes its metrics."""
    set_all(monkeypatch, variables)
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # what Lightning reads from them
    assert run(make_config()) == 0
    assert checkpoint_format.read(tmp_path / "checkpoints" / "final.ckpt")["world_size"] == 1
    assert (tmp_path / "logs" / "tiny" / "metrics.csv").exists()


# --- how the processes were started -----------------------------------------------------------------------------------


def task(rank: int, n_tasks: int, per_node: int | None) -> dict[str, str]:
    """The variables of one task of an srun step on one node."""
    found = ONE_TASK | {
        "SLURM_NTASKS": str(n_tasks),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    }
    return found if per_node is None else found | {"SLURM_NTASKS_PER_NODE": str(per_node)}


def torchrun(rank: int, n: int) -> dict[str, str]:
    """The variables of one process of torchrun."""
    return {"TORCHELASTIC_RUN_ID": "a", "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(n)}


@pytest.mark.parametrize(
    ("variables", "kind", "rank"),
    [
        ({}, LightningEnvironment, 0),
        ({"LOCAL_RANK": "1"}, LightningEnvironment, 1),
        (task(1, 2, 2), SLURMEnvironment, 1),
        (task(1, 2, 2) | {"SLURM_STEP_NUM_TASKS": "2"}, SLURMEnvironment, 1),
        (torchrun(1, 2), TorchElasticEnvironment, 1),
        (task(0, 1, 1) | torchrun(1, 2), TorchElasticEnvironment, 1),
    ],
)
def test_two_processes_are_of_the_program_that_started_them(monkeypatch, variables, kind, rank):
    """srun with two tasks; torchrun, also inside a job of one task; else Lightning starts the second one itself."""
    set_all(monkeypatch, variables)
    launcher = find_launcher(HardwareConfig(devices=2))
    assert (type(launcher), rank_zero_only.rank) == (kind, rank)
    assert not getattr(launcher, "auto_requeue", False)


COUNT = "hardware.devices: hardware.devices x hardware.num_nodes is {}, but {} started {} processes. Set both to"


@pytest.mark.parametrize(
    ("variables", "devices", "message"),
    [
        (task(0, 4, 4), 2, COUNT.format(2, "SLURM", 4)),
        (task(1, 2, 2), 1, COUNT.format(1, "SLURM", 2)),
        (task(0, 2, 2) | {"SLURM_STEP_NUM_TASKS": "2"}, 1, COUNT.format(1, "SLURM", 2)),
        (torchrun(0, 2), 1, COUNT.format(1, "torchrun", 2)),
        (
            task(0, 2, None),
            2,
            "hardware.devices: is 2, but SLURM_NTASKS_PER_NODE is not set. "
            "Start the job with --ntasks-per-node=2, not with --ntasks.",
        ),
        ({"SLURM_NTASKS": "two"}, 1, "SLURM_NTASKS: must be a number, got two. Unset this"),
    ],
)
def test_another_number_of_processes_is_an_error(monkeypatch, variables, devices, message):
    set_all(monkeypatch, variables)
    with pytest.raises(UserError) as caught:
        find_launcher(HardwareConfig(devices=devices))
    assert str(caught.value).startswith(message)


@pytest.mark.slow
def test_too_many_tasks_are_one_line_and_exit_2(make_config: Make, tmp_path: Path) -> None:
    """Rank 1 of a step of two tasks, for a config of one process."""
    program = [sys.executable, str(Path(train.__file__)), "--config", str(make_config())]
    environment = os.environ | task(1, 2, 2)
    done = programs.run(
        [*program, *elsewhere(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: hardware.devices: ")


@pytest.mark.slow
def test_the_batch_script_of_the_guide_requeues_a_stopped_run(
    make_config: Make, tmp_path: Path
) -> None:
    """SIGUSR1 to the script, as SLURM sends it; the requeued job ends as a run without a stop."""
    guide = (ROOT / "docs" / "SCALING.md").read_text(encoding="utf-8")
    (script,) = [text for text in guide.split("```text\n")[1:] if "scontrol requeue" in text]
    config = make_config(training={"max_steps": 300, "val_every_steps": 100})
    command = f"{sys.executable} {ROOT / 'train.py'} --config {config}"
    script = script.partition("```")[0]
    script = script.replace("python train.py --config config.yaml", command)
    (tmp_path / "requeue.sbatch").write_text(script, encoding="utf-8")
    stand_in = tmp_path / "bin" / "scontrol"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path / "calls"}\n', encoding="utf-8")
    stand_in.chmod(0o755)
    path = f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}"
    words = ["bash", str(tmp_path / "requeue.sbatch")]
    environment = os.environ | ONE_TASK | {"PATH": path, "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(words, cwd=tmp_path, env=environment)
    metrics, began = tmp_path / "logs" / "tiny" / "metrics.csv", time.monotonic()
    while not (metrics.exists() and len(metrics.read_text(encoding="utf-8").splitlines()) > 5):
        assert job.poll() is None and time.monotonic() - began < 120
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == 138
    assert (tmp_path / "calls").read_text(encoding="utf-8") == "requeue 1234\n"
    assert subprocess.run(words, cwd=tmp_path, env=environment, check=False).returncode == 0
    assert (tmp_path / "calls").read_text(encoding="utf-8") == "requeue 1234\n"
    assert run(config, *elsewhere(tmp_path / "calm")) == 0
    assert_same_run(tmp_path / "calm", tmp_path)
