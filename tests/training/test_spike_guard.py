"""training.skip_spikes: steps far outside the band of the last ones are skipped, also on resume (FAULTS: D1-D5)."""

import csv
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import model
from tests import programs
from tests.training.test_fp16 import fp16_on_cpu  # noqa: F401
from tests.training.test_train import (
    HARD,
    ROOT,
    Capture,
    Make,
    Patch,
    assert_same_run,
    curve,
    elsewhere,
    run,
)
from tinylm.checkpoint import format as checkpoint_format

# With a band after 2 steps, the first values of a run are the band.
GUARD = {"training": {"skip_spikes": 6, "grad_accum_steps": 3, "keep_last": None}}
GUARD["training"]["save_every_steps"] = 1


@pytest.fixture(autouse=True)
def short_band(monkeypatch: Patch) -> None:
    """Compare from step 3 on, so that runs of 6 steps show the rule."""
    monkeypatch.setattr(model, "MIN_STEPS", 2)


def poison(patch: Patch, steps: set[int], factor: float = 20.0) -> None:
    """Multiply the loss of one micro-batch of each of these steps (1, 2, ...), also in a resumed run."""
    original = model.LanguageModule.batch_loss

    def batch_loss(self: Any, batch: Any, **settings: Any) -> Any:
        found = original(self, batch, **settings)
        if self.training and self.progress.step + 1 in steps and len(self._losses) == 1:
            found = found._replace(loss=found.loss * factor)
        return found

    patch.setattr(model.LanguageModule, "batch_loss", batch_loss)


def rows(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv."""
    with open(folder / "logs" / "tiny" / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def state_at(folder: Path, step: int) -> dict[str, Any]:
    """The checkpoint of a step."""
    return checkpoint_format.read(folder / "checkpoints" / f"step-{step:06d}.ckpt")


def same(a: Any, b: Any) -> bool:
    """Whether two nested values are equal, tensors exactly."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# --- the rule ---------------------------------------------------------------------------------------------------------


def test_the_limit_is_worked_out_by_hand():
    """21 losses 1, 2, 3: median 2, MAD 1, so the limit at factor 2 is 2 + 2 · 1.4826 = 4.9652; one
    below is no spike.
    """
    history = [[loss, 1.0] for loss in (1.0, 2.0, 3.0)] * 7
    assert model.spike_in({"loss": 4.96, "norm": 1.0}, history, 2) is None
    assert model.spike_in({"loss": 4.97, "norm": 1.0}, history, 2) is not None
    assert model.spike_in({"loss": -100.0, "norm": 0.0}, history, 2) is None, "only above"
    # The norm never differed: its spread is 1% of 1, so the limit is 1.02.
    assert model.spike_in({"loss": 2.0, "norm": 1.019}, history, 2) is None
    found = model.spike_in({"loss": 2.0, "norm": 1.021}, history, 2)
    assert found == "the norm is 1.021, above 1.02, the limit by the last 21 steps (median 1)"


def test_earlier_outliers_do_not_widen_the_band():
    """A tenth of outliers moves a mean and a standard deviation; median and MAD hardly."""
    history = [[2.0 + i % 5 / 10, 1.0] for i in range(90)] + [[1e6, 1.0]] * 10
    assert model.spike_in({"loss": 4.0, "norm": 1.0}, history, 6) is not None


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_spike_is_skipped_counted_and_named(
    make_config: Make, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """D4: step 4 of 6 is 20 times too high: weights, moments and tokens are those of step 3, and
    step 5 trains again.
    """
    poison(monkeypatch, {4})
    assert run(make_config(**GUARD)) == 0
    error = capsys.readouterr().err
    assert "step 4: the loss is " in error and "the limit by the last 3 steps" in error
    assert "; rows at [[" in error and "The step is skipped (1 so far)" in error
    assert "done: 6 steps (1 skipped) in " in error
    before, skipped, after = (state_at(tmp_path, step) for step in (3, 4, 5))
    for state in (before, skipped, after):
        state["moments"] = state["optimizer"]["state"]
    for key in ("weights", "moments", "tokens"):
        assert same(before[key], skipped[key]), key
        assert not same(skipped[key], after[key]), key
    assert (skipped["step"], skipped["progress"]["skipped_in_a_row"]) == (4, 1)
    assert after["progress"]["skipped_in_a_row"] == 0
    assert [row["skipped_steps"] for row in rows(tmp_path)] == ["0", "0", "0", "1", "1", "1"]
    assert [row["train_loss"] == "" for row in rows(tmp_path)] == [False] * 3 + [True] + [False] * 2
    # The gradient of a third of the step is 20 times as long; the column shows it.
    norms = [float(row["grad_norm"]) for row in rows(tmp_path)]
    assert norms[3] > 3 * max(norms[:3])


@pytest.mark.slow
def test_without_the_setting_a_spike_is_trained(
    make_config: Make, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Off by default: no column, no history, no step skipped."""
    poison(monkeypatch, {4})
    assert run(make_config(**HARD)) == 0
    assert "skipped_steps" not in rows(tmp_path)[0]
    progress = checkpoint_format.read(tmp_path / "checkpoints" / "final.ckpt")["progress"]
    assert (progress["skipped_steps"], progress["recent"]) == (0, [])
    assert len(curve(tmp_path)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [3, 4])
def test_a_run_stopped_around_a_skip_resumes_to_the_last_bit(
    make_config: Make, tmp_path: Path, monkeypatch: Patch, stop_at: int
) -> None:
    """D5: the band, the counts and the weights are in the checkpoint; step 5 is skipped by the band of steps 1 to 4."""
    poison(monkeypatch, {4, 5})
    config, calm = make_config(**GUARD), tmp_path / "calm"
    flags = ["training.schedule=constant", "training.val_every_steps=1"]
    assert run(config, *flags, *elsewhere(calm)) == 0
    assert run(config, *flags, f"training.max_steps={stop_at}") == 0
    assert run(config, *flags) == 0
    assert_same_run(calm, tmp_path)
    assert rows(calm)[3]["skipped_steps"] == "1"
    for step in range(1, 7):
        ours, theirs = state_at(tmp_path, step), state_at(calm, step)
        for key in ("weights", "optimizer"):
            assert same(ours[key], theirs[key]), (step, key)
        for key in ("recent", "skipped_steps", "skipped_in_a_row"):
            assert ours["progress"][key] == theirs["progress"][key], (step, key)
    assert state_at(calm, 6)["progress"]["skipped_steps"] == 2


@pytest.mark.slow
def test_without_its_history_a_resumed_run_differs(
    make_config: Make, tmp_path: Path, monkeypatch: Patch
) -> None:
    """The comparison above can fail: a run that forgets the band at step 3 trains the spike of step 4."""
    poison(monkeypatch, {4})
    config = make_config(**GUARD)
    assert run(config, "training.max_steps=3") == 0
    original = model.Progress.__init__
    monkeypatch.setattr(
        model.Progress,
        "__init__",
        lambda self, **plain: original(self, **(plain | {"recent": []})),
    )
    assert run(config) == 0
    assert state_at(tmp_path, 6)["progress"]["skipped_steps"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_skipped_before_there_is_a_band(
    make_config: Make, tmp_path: Path, monkeypatch: Patch, capsys: Capture, factor: float
) -> None:
    """D1 with the policy to skip: nothing of it reaches weights, moments or the mean of the next row."""
    poison(monkeypatch, {1}, factor)
    assert run(make_config(**GUARD), "training.log_every_steps=3") == 0
    assert f"step 1: the loss is {factor}; rows at [[" in capsys.readouterr().err
    assert all(math.isfinite(float.fromhex(loss)) for loss in curve(tmp_path).values())
    state = state_at(tmp_path, 6)
    assert all(weight.isfinite().all() for weight in state["weights"].values())
    assert state["progress"]["skipped_steps"] == 1


@pytest.mark.slow
def test_one_infinite_gradient_is_skipped(
    make_config: Make, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """D2: the loss is finite, one element of one gradient is not."""
    original = model.TrainingModule._step_totals

    def break_gradient(self: Any) -> Any:
        if self.progress.step == 2:
            self.decoder.embedding.weight.grad[0, 0] = math.inf
        return original(self)

    monkeypatch.setattr(model.TrainingModule, "_step_totals", break_gradient)
    assert run(make_config(**GUARD)) == 0
    assert "step 3: the gradient norm is inf; rows at [[" in capsys.readouterr().err
    assert same(state_at(tmp_path, 2)["weights"], state_at(tmp_path, 3)["weights"])


@pytest.mark.slow
def test_too_many_skips_in_a_row_are_a_divergence(
    make_config: Make, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """D3: from step 3 on always NaN. The limit counts over a resume: 3 before the stop, the fourth after it."""
    monkeypatch.setattr(model, "MAX_IN_A_ROW", 4)
    poison(monkeypatch, set(range(3, 100)), math.nan)
    config = make_config(**GUARD)
    assert run(config, "training.max_steps=5") == 0
    assert run(config, "training.max_steps=20") == 3
    error = capsys.readouterr().err
    assert "error: step 6: the loss is nan; rows at [[" in error
    assert ". 4 steps in a row were skipped. Lower training.lr, or look at these rows. " in error
    good = tmp_path / "checkpoints" / "step-000005.ckpt"
    assert f"The last good checkpoint is {good}: the same command continues" in error
    assert not (tmp_path / "checkpoints" / "step-000006.ckpt").exists()


@pytest.mark.slow
def test_the_guard_can_be_switched_on_in_a_run_and_off_again(
    make_config: Make, tmp_path: Path, capsys: Capture
) -> None:
    """No row of metrics.csv is lost: before there is no count, afterwards the column stays."""
    config = make_config(**HARD)
    assert run(config, "training.max_steps=2") == 0
    on = "training.skip_spikes=6"
    assert run(config, "training.max_steps=4", on) == 2
    assert "training.skip_spikes was None when it was saved" in capsys.readouterr().err
    assert run(config, "training.max_steps=4", on, "--allow-changes") == 0
    assert run(config, "--allow-changes") == 0
    counts = [row["skipped_steps"] for row in rows(tmp_path)]
    assert counts == ["", "", "0", "0", "0", "0"]
    assert len(curve(tmp_path)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("factor", [20.0, math.nan])
def test_with_a_gradient_scaler(
    make_config: Make,
    tmp_path: Path,
    fp16_on_cpu: None,  # noqa: F811
    monkeypatch: Patch,
    factor: float,
) -> None:
    """fp16: a spike leaves the scale as it is; a NaN halves it, as an overflow does."""
    poison(monkeypatch, {4}, factor)
    assert run(make_config(**GUARD, hardware={"precision": "16"})) == 0
    before, skipped, last = (state_at(tmp_path, step) for step in (3, 4, 6))
    assert same(before["weights"], skipped["weights"])
    assert not same(skipped["weights"], last["weights"])
    assert last["progress"]["skipped_steps"] == 1
    assert last["precision"]["scale"] == (2.0**8 if factor == 20 else 2.0**7)


@pytest.mark.slow
def test_with_bf16(make_config: Make, tmp_path: Path, monkeypatch: Patch) -> None:
    """Autocast has no scaler: as in fp32."""
    poison(monkeypatch, {4})
    assert run(make_config(**GUARD, hardware={"precision": "bf16"})) == 0
    assert same(state_at(tmp_path, 3)["weights"], state_at(tmp_path, 4)["weights"])
    assert state_at(tmp_path, 6)["progress"]["skipped_steps"] == 1


RANK = """
import os, sys
sys.path.insert(0, os.getcwd())
import model, train

model.MIN_STEPS = 2
original = model.LanguageModule.batch_loss

def batch_loss(self, batch, **settings):
    found = original(self, batch, **settings)
    if self.training and self.progress.step == 3 and os.environ["RANK"] == "1":
        found = found._replace(loss=found.loss * 40)
    return found

model.LanguageModule.batch_loss = batch_loss
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_all_ranks_skip_the_spike_of_one(make_config: Make, tmp_path: Path) -> None:
    """The loss of rank 1 alone is too high: both skip the step, and the run ends with 6 steps."""
    script = tmp_path / "rank.py"
    script.write_text(RANK, encoding="utf-8")
    config = make_config(**GUARD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(script), "--config", str(config)]
    command += ["hardware.devices=2", "hardware.strategy=fsdp"]
    processes = []
    for rank in ("0", "1"):
        env = os.environ | {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "NODE_RANK": "0"}
        env |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        env |= {"MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        processes.append(
            programs.Program(command, cwd=ROOT, env=env, text=True, stderr=subprocess.PIPE)
        )
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert errors[0].count("step 4: the loss is ") == 1
    assert same(state_at(tmp_path, 3)["weights"], state_at(tmp_path, 4)["weights"])
    assert state_at(tmp_path, 6)["progress"]["skipped_steps"] == 1
    assert len(curve(tmp_path)) == 5, "every step but the skipped one has a loss"
