"""Experiments: their configs and steps, results that are reused, and signals."""

import csv
import dataclasses
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import programs
from tinylm.__main__ import main
from tinylm.checkpoint import format as checkpoint_format
from tinylm.common.errors import UserError
from tinylm.config.loader import load_config
from tinylm.model.decoder import Decoder, active_parameters, count_parameters
from tinylm.runs import experiments
from tinylm.runs.experiments import (
    Outcome,
    Step,
    all_run_names,
    is_done,
    plan_steps,
    run_steps,
    step_inputs,
)

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(ROOT.glob("configs/experiments/*.yaml"))


# --- the configs ----------------------------------------------------------------------------------


def built(name: str) -> Decoder:
    config = load_config(ROOT / "configs/experiments" / f"{name}.yaml")
    return Decoder(config.model.model_copy(update={"vocab_size": 260}))


def test_every_config_belongs_to_a_question_and_names_its_command():
    assert {path.stem for path in CONFIGS} == set(all_run_names())
    for path in CONFIGS:
        assert f"python train.py --config configs/experiments/{path.name}" in path.read_text(
            encoding="utf-8"
        )


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.stem != "base"], ids=lambda path: path.stem
)
def test_a_run_differs_from_the_base_in_one_setting(path):
    """adamw: also its own lr. moe: two experts of half the width. window-sinks: two settings."""
    base, run = (
        dict(experiments._flat(load_config(file).to_plain()))
        for file in (path.with_name("base.yaml"), path)
    )
    places = {"training.checkpoint_dir", "training.run_name"}
    changed = {key for key in base.keys() | run.keys() if base.get(key) != run.get(key)} - places
    expected = {
        "adamw": {"training.optimizer", "training.lr"},
        "moe": {
            "model.d_ff",
            "model.moe",
            "model.moe.n_experts",
            "model.moe.top_k",
            "model.moe.balance_coef",
        },
        "window-sinks": {"model.sliding_window", "model.n_sinks"},
    }
    assert changed == expected[path.stem] if path.stem in expected else len(changed) == 1


def test_moe_has_the_active_parameters_of_the_dense_model_and_its_routers():
    """The routers: 4 layers, 8 experts, 128 weights per expert."""
    dense, moe = built("base"), built("moe")
    assert active_parameters(dense) == count_parameters(dense)
    assert active_parameters(moe) == count_parameters(dense) + 4 * 8 * 128
    assert count_parameters(moe) > 2 * count_parameters(dense)


# --- steps ----------------------------------------------------------------------------------------


def test_every_run_is_a_step_per_seed():
    steps = {step.name: step for step in plan_steps(Path("out"), seeds=2)}
    assert {f"pretrain: {name}" for name in all_run_names()} < steps.keys()
    first, second = steps["pretrain: gqa"], steps["pretrain: gqa-seed2"]
    assert (
        second.command[-1]
        == f"training.seed={load_config(ROOT / 'configs/learn.yaml').training.seed + 1}"
    )
    assert not any(word.startswith("training.seed") for word in first.command)
    assert (first.result, second.result) == (
        Path("out/runs/gqa/final.ckpt"),
        Path("out/runs/gqa-seed2/final.ckpt"),
    )


@pytest.mark.slow
def test_the_command_of_every_step_is_valid(monkeypatch):
    """Settings and tasks are checked; the checkpoints that steps load do not exist yet."""
    monkeypatch.chdir(ROOT)
    for step in plan_steps(Path("out"), seeds=2):
        assert step_inputs(step)
        assert Path(step.command[0]).is_file()


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project folder with a dataset and a config, and programs of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tinylm.runs.experiments.app_folder", lambda: tmp_path)
    (tmp_path / "configs/experiments").mkdir(parents=True)
    (tmp_path / "text.txt").write_text("one\ntwo\n", encoding="utf-8")
    (tmp_path / "a.yaml").write_text(
        "data:\n  dataset: text.txt\ntraining:\n  lr: 1e-3\n", encoding="utf-8"
    )
    return tmp_path


def step_of(project: Path, name: str = "a", code: str = "", config: str = "a.yaml") -> Step:
    """A step whose program counts its runs, runs `code` and writes a result."""
    program = f"""
import sys, time, signal, pathlib
open({name + ".ran"!r}, "a").write("x")
{code}
folder = pathlib.Path("runs/{name}")
folder.mkdir(parents=True, exist_ok=True)
(folder / "final.ckpt").write_text("x")
"""
    (project / f"{name}.py").write_text(program, encoding="utf-8")
    folder = Path("runs") / name
    return Step(
        f"pretrain: {name}",
        "pretrain",
        (f"{name}.py", "--config", config),
        folder / "final.ckpt",
        Path("output") / f"{name}.txt",
    )


def runs_of(name: str = "a") -> int:
    path = Path(f"{name}.ran")
    return len(path.read_text(encoding="utf-8")) if path.exists() else 0


@pytest.fixture
def run_all(caplog) -> Callable[..., tuple[Outcome, list[str]]]:
    """Run steps; returns the outcome and the logged lines."""

    def run(*steps: Step) -> tuple[Outcome, list[str]]:
        caplog.clear()
        with caplog.at_level(logging.INFO, "tinylm"):
            outcome = run_steps(steps)
        return outcome, [record.getMessage() for record in caplog.records]

    return run


def test_a_step_with_a_result_is_not_run_again(project, run_all):
    step = step_of(project)
    assert run_all(step) == (Outcome(), ["pretrain: a: done"])
    assert run_all(step) == (Outcome(), ["pretrain: a: already done (runs/a/final.ckpt)"])
    assert runs_of() == 1


@pytest.mark.slow
def test_a_result_without_a_record_is_run_again(project, run_all):
    """As after a kill: train.py resumes the run or reports that it is complete."""
    step = step_of(project)
    run_all(step)
    step.record.unlink()
    assert run_all(step)[1] == ["pretrain: a: done"]
    assert runs_of() == 2


def test_a_result_of_other_settings_is_an_error_and_is_kept(project, run_all):
    step = step_of(project)
    run_all(step)
    (project / "a.yaml").write_text(
        "data:\n  dataset: text.txt\ntraining:\n  lr: 2e-3\n", encoding="utf-8"
    )
    outcome, logged = run_all(step)
    assert outcome == Outcome(("pretrain: a",))
    assert logged == [
        "pretrain: a: runs/a/final.ckpt: training.lr was 0.001 when this file was made and is "
        "0.002 now. Set it back, or remove runs/a to make it again."
    ]
    assert runs_of() == 1


def test_a_result_of_another_dataset_is_an_error(project, run_all):
    step = step_of(project)
    run_all(step)
    (project / "text.txt").write_text("one\nthree\n", encoding="utf-8")
    with pytest.raises(
        UserError,
        match=r"content of text.txt was \w{16} when this file was made and is \w{16} now",
    ):
        is_done(step)


def test_output_paths_are_not_inputs_of_a_step(project):
    step = step_of(project)
    moved = dataclasses.replace(
        step, command=(*step.command, "training.checkpoint_dir=elsewhere", "training.run_name=b")
    )
    assert step_inputs(step) == step_inputs(moved)


def test_a_result_that_another_step_loads_is_compared_by_content(project, run_all):
    step = dataclasses.replace(step_of(project), reads=(Path("base.ckpt"),))
    Path("base.ckpt").write_text("one", encoding="utf-8")
    run_all(step)
    assert is_done(step)
    Path("base.ckpt").write_text("two", encoding="utf-8")
    with pytest.raises(UserError, match=r"content of base.ckpt was"):
        is_done(step)


def test_a_step_whose_input_was_not_made_is_a_failure_and_is_not_run(project, run_all):
    """Else its program would work with the inputs that are there, and the result would be kept."""
    step = dataclasses.replace(step_of(project), reads=(Path("base.ckpt"),))
    outcome, [logged] = run_all(step)
    assert outcome.failed == ("pretrain: a",)
    assert logged == (
        "pretrain: a: base.ckpt: not found; another step makes it. Run that step first."
    )
    assert not Path("a.ran").exists()


def test_a_step_without_its_optional_package_is_left_out(project, run_all):
    """It has not failed: a task that is scored with a package of its own is no part of the others."""
    alone = dataclasses.replace(step_of(project, "a"), package="no_such_package")
    outcome, lines = run_all(alone, step_of(project, "b"))
    assert (outcome.failed, runs_of("a"), runs_of("b")) == ((), 0, 1)
    assert lines[0] == (
        "pretrain: a: left out: no_such_package: this package is needed and is not installed. "
        "pip install no_such_package."
    )


@pytest.mark.slow
def test_a_failed_step_is_logged_with_its_error_and_the_next_is_run(project, run_all):
    first = step_of(project, "a", "sys.exit('error: no such thing.')")
    outcome, logged = run_all(first, step_of(project, "b"))
    assert outcome == Outcome(("pretrain: a",))
    assert logged == ["pretrain: a: exit code 1: error: no such thing.", "pretrain: b: done"]
    assert not first.record.exists()


@pytest.mark.slow
def test_a_killed_step_is_a_failure_and_the_next_is_run(project, run_all):
    """As when out of memory: 128 + 9. Only SIGINT and SIGTERM stop all steps."""
    outcome, logged = run_all(
        step_of(project, "a", "import os; os.kill(os.getpid(), signal.SIGKILL)"),
        step_of(project, "b"),
    )
    assert outcome == Outcome(("pretrain: a",))
    assert logged == ["pretrain: a: exit code 137: no output", "pretrain: b: done"]


def test_a_step_with_an_invalid_config_fails(project, run_all):
    step = step_of(project)
    run_all(step)
    (project / "a.yaml").write_text("training:\n  rate: 1\n", encoding="utf-8")
    outcome, [logged] = run_all(step)
    assert outcome.failed == ("pretrain: a",)
    assert logged.startswith("pretrain: a: a.yaml:2: training.rate:")


def test_a_program_that_exits_after_a_signal_stops_all_steps(project, run_all):
    outcome, logged = run_all(step_of(project, "a", "sys.exit(143)"), step_of(project, "b"))
    assert outcome == Outcome((), 143)
    assert logged == ["pretrain: a: stopped; run the same command again to continue"]
    assert runs_of("b") == 0


def test_an_output_that_cannot_be_written_is_a_failure_of_one_line(project, run_all):
    (project / "output").write_text("a file", encoding="utf-8")
    outcome, [logged] = run_all(step_of(project))
    assert outcome.failed == ("pretrain: a",)
    problem = "cannot be written: File exists. Change --out, or move the file that is there."
    assert logged == f"pretrain: a: output/a.txt: {problem}"


def test_a_full_disk_is_a_failure_of_one_line(project, monkeypatch, run_all):
    """The record is written after the run."""

    def full(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    outcome, [logged] = run_all(step_of(project))
    assert outcome.failed == ("pretrain: a",)
    problem = "cannot be written: No space left on device. Free disk space or change --out."
    assert logged == f"pretrain: a: runs/a/made-from.json: {problem}"


def test_outside_the_project_folder_nothing_is_run(tmp_path, monkeypatch, run_all):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        run_all()
    assert str(error.value) == (
        "configs/experiments: not found in this folder. Run experiments in the checkout, or in a "
        "folder that python -m tinylm new made."
    )


WAITS = """
def stop(number, frame):
    with open('signals', 'a') as file:
        file.write(f'{number} ')
    time.sleep(0.2)  # time for a second signal
    sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, stop)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # as run_program does
open('waiting', 'w').close()
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "got"),
    [(signal.SIGINT, 130, "2 "), (signal.SIGTERM, 143, "15 "), (signal.SIGHUP, 129, "1 ")],
)
def test_a_signal_reaches_the_program_once_and_stops_all_steps(project, number, code, got):
    """Sent to the process group, as by a terminal."""
    steps = [step_of(project, "a", WAITS), step_of(project, "b")]
    process = start_apart(project, steps)
    wait_for(project / "waiting")
    os.killpg(process.pid, number)
    assert process.wait(timeout=20) == code
    assert (project / "signals").read_text(encoding="utf-8") == got
    assert runs_of("b") == 0
    assert not (project / "runs/a/made-from.json").exists()


@pytest.mark.slow
def test_a_second_signal_kills_a_program_that_ignores_the_first(project):
    stubborn = WAITS.replace("    sys.exit(128 + number)\n", "")
    process = start_apart(project, [step_of(project, "a", stubborn + "time.sleep(60)")])
    wait_for(project / "waiting")
    process.send_signal(signal.SIGINT)
    wait_for(project / "signals")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 137


def start_apart(project: Path, steps: list[Step]) -> subprocess.Popen:
    """`run_steps` in its own process; it restores the signals that background jobs ignore."""
    code = f"""
import signal, sys
from pathlib import Path, PosixPath
from tinylm.runs import experiments
from tinylm.runs.experiments import Step, run_steps
experiments.app_folder = Path.cwd  # where the programs of the steps are
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.exit(run_steps({steps!r}).stopped)
"""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or (path.name == "signals" and not path.read_text(encoding="utf-8")):
        assert time.monotonic() < deadline, f"{path.name} was not written"
        time.sleep(0.02)


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", ["0", "101"])
def test_seeds_must_be_from_1_to_100(seeds, capsys):
    assert main(["experiments", "--phase", "eval", "--seeds", seeds]) == 2
    problem = f"must be from 1 to 100, got {seeds}. Give the number of runs of each model."
    assert capsys.readouterr().err == f"error: --seeds: {problem}\n"


@pytest.mark.slow
@pytest.mark.long  # the test of the README types the command
def test_smoke_writes_a_report_and_runs_nothing_the_second_time(tmp_path):
    """Two small models train for 8 steps and one is fine-tuned; so are a GPT-2 and a T5 of random weights, which
    are scored on their tasks. All are measured, and there is no network.
    """
    command = [
        sys.executable,
        "-m",
        "tinylm",
        "experiments",
        "--phase",
        "smoke",
        "--out",
        str(tmp_path),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "smoke"
    assert done.stdout == f"{out / 'report.md'}\n"
    names = {
        "report.md",
        "evaluation.csv",
        "positions.csv",
        "generations.json",
        "question-6.png",
        "positions.png",
        "streams.png",
    }
    assert names < {path.name for path in out.iterdir()}
    with open(out / "evaluation.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    checkpoints = [
        ("base", "4"),
        ("base", "8"),
        ("window-sinks", "4"),
        ("window-sinks", "8"),
        ("finetune", "4"),
        ("finetune", "8"),
        ("sst2-gpt2-lora", "4"),
        ("sst2-gpt2-lora", "8"),
        ("samsum-t5-lora", "4"),
        ("samsum-t5-lora", "8"),
    ]
    assert [(row["run"], row["step"]) for row in rows] == checkpoints
    assert all(
        float(row["val_ppl"]) == pytest.approx(math.exp(float(row["val_loss"]))) for row in rows
    )
    for picture in ("question-6.png", "positions.png", "streams.png"):
        assert f"]({picture})" in (out / "report.md").read_text(encoding="utf-8")
    # The evaluation has the same validation loss as training had on the same rows.
    metrics = list(
        csv.DictReader((out / "logs/base/metrics.csv").read_text(encoding="utf-8").splitlines())
    )
    assert float(metrics[-1]["val_loss"]) == pytest.approx(float(rows[1]["val_loss"]), rel=1e-4)
    again = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    for task, kind in (("sst2", "gpt2"), ("samsum", "t5")):
        results = json.loads((out / "tasks" / task / "results.json").read_text(encoding="utf-8"))
        text = json.dumps(results)
        assert f"runs/{task}-{kind}-lora/final.ckpt" in text
        assert f"hf:{out / 'models' / kind}" in text
    assert again.stderr.count(": already done (") == 7
    assert (again.returncode, again.stdout) == (0, done.stdout)


@pytest.mark.slow
def test_a_stopped_command_saves_a_checkpoint(tmp_path):
    """SIGTERM in the first pretraining run: exit code 143, a checkpoint, and no lock is left."""
    command = [
        sys.executable,
        "-m",
        "tinylm",
        "experiments",
        "--phase",
        "pretrain",
        "--out",
        str(tmp_path),
    ]
    process = programs.Program(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    output, deadline = tmp_path / "output/base.txt", time.monotonic() + 120
    while not (output.exists() and "step " in output.read_text(encoding="utf-8")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.terminate()
    _, logged = process.communicate(timeout=60)
    assert process.returncode == 143
    assert logged.endswith("pretrain: base: stopped; run the same command again to continue\n")
    assert checkpoint_format.latest_valid(tmp_path / "runs/base") is not None
    with checkpoint_format.RunLock(tmp_path / "runs/base"):
        pass
