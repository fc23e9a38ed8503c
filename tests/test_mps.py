"""What a Mac must check: `pytest -m mps`. On Apple's GPU, each part gives the numbers of the CPU up to rounding.

Elsewhere every test here skips. To try the tests themselves, set DEVICE to "cpu".
"""

import math
from pathlib import Path

import pytest
import torch

from tests.model.test_decoder import AXES, SMALL
from tests.training import test_dpo, test_finetune, test_train, test_verifier_stage
from tests.training.test_finetune import home, make  # noqa: F401  (fixtures)
from tests.training.test_train import HARD, Capture, Make, curve, elsewhere
from tinylm.checkpoint.load import load_model
from tinylm.config.schema import ModelConfig, SamplingConfig
from tinylm.generate.engine import Engine
from tinylm.model.decoder import Decoder

DEVICE = "mps"
if DEVICE == "mps" and not torch.backends.mps.is_available():
    pytest.skip("needs Apple's GPU", allow_module_level=True)
pytestmark = pytest.mark.mps
ON_DEVICE = f"hardware.accelerator={DEVICE}"
prefer = test_dpo.prefer
ask = test_verifier_stage.make
SHAPES = [{}] + [{name: value} for name, values in AXES.items() for value in values[1:]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_and_gradients_equal_the_cpus(shape: dict) -> None:
    """Every option of the decoder, two documents in a row of 12 tokens."""
    config = ModelConfig(**SMALL | shape)
    torch.manual_seed(0)
    models = [Decoder(config)]
    models.append(Decoder(config).to(DEVICE))
    models[1].load_state_dict(models[0].state_dict())
    ids = torch.randint(31, (2, 12))
    found = []
    for model, device in zip(models, ("cpu", DEVICE), strict=True):
        logits = model(ids.to(device))
        logits.square().mean().backward()
        grads = [weight.grad.cpu() for weight in model.parameters() if weight.grad is not None]
        found.append([logits.detach().cpu(), *grads])
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_plain", "sgd", "muon"])
def test_a_run_has_the_losses_of_the_cpu(make_config: Make, tmp_path: Path, optimizer: str) -> None:
    """6 steps without dropout, with accumulation and validation; the same rows, other arithmetic."""
    config = make_config(training={"grad_accum_steps": 2, "optimizer": optimizer})
    assert test_train.run(config, *elsewhere(tmp_path / "cpu")) == 0
    assert test_train.run(config, ON_DEVICE) == 0
    for name in ("train_loss", "val_loss", "grad_norm"):
        ours, theirs = curve(tmp_path, name), curve(tmp_path / "cpu", name)
        assert ours.keys() == theirs.keys()
        for step, value in ours.items():
            expected = float.fromhex(theirs[step])
            assert float.fromhex(value) == pytest.approx(expected, rel=0.02), (name, step)


def test_a_stopped_run_resumes(make_config: Make, tmp_path: Path) -> None:
    """With dropout, from step 3; up to rounding, because a GPU may add in another order each time."""
    calm = tmp_path / "calm"
    config = make_config(**HARD)
    flags = [ON_DEVICE, "training.schedule=constant", "training.val_every_steps=1"]
    assert test_train.run(config, *flags, *elsewhere(calm)) == 0
    for steps in (3, 6):
        assert test_train.run(config, *flags, f"training.max_steps={steps}") == 0
    ours, theirs = curve(tmp_path), curve(calm)
    assert ours.keys() == theirs.keys()
    for step, value in ours.items():
        assert float.fromhex(value) == pytest.approx(float.fromhex(theirs[step]), rel=1e-3)


def test_bf16_trains(make_config: Make, tmp_path: Path) -> None:
    """Autocast: finite losses, near those of fp32."""
    assert test_train.run(make_config(), *elsewhere(tmp_path / "fp32"), ON_DEVICE) == 0
    assert test_train.run(make_config(), ON_DEVICE, "hardware.precision=bf16") == 0
    last, expected = (float.fromhex(curve(folder)[6]) for folder in (tmp_path, tmp_path / "fp32"))
    assert math.isfinite(last) and last == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0}, {"n_beams": 3}, {"temperature": 0, "repetition_penalty": 1.3}],
    ids=str,
)
def test_a_checkpoint_writes_the_text_of_the_cpu(
    make_config: Make, tmp_path: Path, sampling: dict
) -> None:
    """Greedy and with beams, past the context, so that the cache is cut."""
    assert test_train.run(make_config(), "training.max_steps=3") == 0
    settings = SamplingConfig(max_new_tokens=40, **sampling)
    texts = []
    for device in ("cpu", DEVICE):
        loaded = load_model(tmp_path / "checkpoints" / "final.ckpt", device=device)
        engine = Engine(loaded.model, loaded.tokenizer)
        texts.append([found.text for found in engine.generate("the model", settings)])
    assert texts[0] == texts[1]


def test_sampling_is_a_function_of_its_seed(make_config: Make, tmp_path: Path) -> None:
    """Equal seeds give equal texts, others do not; every filter is on."""
    assert test_train.run(make_config(), "training.max_steps=3") == 0
    loaded = load_model(tmp_path / "checkpoints" / "final.ckpt", device=DEVICE)
    engine = Engine(loaded.model, loaded.tokenizer)
    texts = []
    for seed in (1, 1, 2):
        settings = SamplingConfig(
            max_new_tokens=20, seed=seed, top_k=40, top_p=0.95, min_p=0.01, n_samples=2
        )
        texts.append([found.text for found in engine.generate("the", settings)])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("name", ["full", "lora"])
def test_fine_tuning_runs(make: Make, tmp_path: Path, capsys: Capture, name: str) -> None:  # noqa: F811
    """Packed rows with document masks; a checkpoint of the CPU begins it."""
    sections = {"lora": {"r": 4}} if name == "lora" else {}
    assert test_finetune.run(make(**sections), ON_DEVICE) == 0
    assert len(curve(tmp_path)) == 6


def test_preferences_run(prefer: Make, tmp_path: Path) -> None:
    """The first step costs ln 2, as on every device."""
    assert test_finetune.run(prefer(), ON_DEVICE) == 0
    assert float.fromhex(curve(tmp_path)[1]) == pytest.approx(math.log(2), rel=0.01)


def test_a_verifier_runs(ask: Make, tmp_path: Path) -> None:
    """Its validation computes the ranking on the CPU: Apple's GPU has no float64."""
    assert test_finetune.run(ask(), ON_DEVICE) == 0
    assert len(curve(tmp_path)) == 6
