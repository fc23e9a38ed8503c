"""fp16 with a gradient scaler, on the CPU: the gradient is unscaled once, and an overflow skips the step.

Training refuses fp16 without CUDA, because it is slow there; its arithmetic is the same.
"""

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

import model
from tests.training.test_train import Make, Patch, curve, run
from tinylm.checkpoint import format as checkpoint_format
from training import build, support

FP16 = {"hardware": {"precision": "16"}}


@pytest.fixture
def fp16_on_cpu(monkeypatch: Patch) -> None:
    """Let a run use fp16 on the CPU, with a small initial scale so that no step overflows by itself."""
    trainer = L.Trainer

    def with_scaler(*, precision: str, plugins: list[Any], **settings: Any) -> L.Trainer:
        assert precision == "16-mixed"
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        fp16 = MixedPrecision("16-mixed", "cpu", scaler)
        return trainer(plugins=[*plugins, fp16], **settings)

    monkeypatch.setattr(build.L, "Trainer", with_scaler)
    monkeypatch.setitem(support.FEATURES, "no CUDA", lambda config, device: False)


@pytest.mark.slow
def test_the_gradient_is_unscaled_once_before_it_is_clipped(
    make_config: Make, tmp_path: Path, fp16_on_cpu: None, monkeypatch: Patch
) -> None:
    """grad_norm and losses equal those of fp32 up to rounding; a wrong unscaling is a factor of 256."""
    assert run(make_config(**FP16)) == 0
    losses, norms = curve(tmp_path), curve(tmp_path, "grad_norm")
    monkeypatch.undo()
    (tmp_path / "fp32").mkdir()
    elsewhere = [
        f"training.checkpoint_dir={tmp_path / 'fp32' / 'checkpoints'}",
        f"training.log_dir={tmp_path / 'fp32' / 'logs'}",
    ]
    assert run(make_config(), *elsewhere) == 0
    for ours, expected in ((losses, "train_loss"), (norms, "grad_norm")):
        theirs = curve(tmp_path / "fp32", expected)
        assert ours.keys() == theirs.keys()
        for step, value in ours.items():
            assert float.fromhex(value) == pytest.approx(float.fromhex(theirs[step]), rel=0.05)


@pytest.mark.slow
def test_an_overflow_skips_the_step_and_is_counted(
    make_config: Make, tmp_path: Path, fp16_on_cpu: None, monkeypatch: Patch
) -> None:
    """No error, as in fp32: the weights stay, the step counts, and the scaler halves its factor."""
    original, weights = model.TrainingModule.training_step, []

    def overflow(self: Any, *given: Any) -> Any:
        weights.append(self.decoder.embedding.weight.detach().clone())
        loss = original(self, *given)
        return loss * math.inf if self.progress.step == 2 else loss

    monkeypatch.setattr(model.TrainingModule, "training_step", overflow)
    assert run(make_config(**FP16)) == 0
    assert torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[3], weights[4])
    state = checkpoint_format.read(tmp_path / "checkpoints" / "final.ckpt")
    assert (state["step"], state["precision"]["scale"]) == (6, 2.0**7)
