"""Settings that are settled once, before step 1: a duration as steps, and what is `auto`."""

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import finetune
from tests.training.test_train import assert_same_run, elsewhere, interrupt_at, run
from tinylm.checkpoint import format as checkpoint_format
from tinylm.common.errors import UserError
from tinylm.config.duration import budget_of
from tinylm.config.loader import load_config
from tinylm.planning import precision
from tinylm.runs.record import RunRecord
from tinylm.runs.run_folder import read_facts
from training import settle
from training.settle import count_steps

Make = Callable[..., Path]
Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]


def lasting(make_config: Make, duration: str, **sections: dict) -> Path:
    """A config of a tiny run with a duration; a step is 4 rows of 16 tokens."""
    training = {"max_steps": None, "duration": duration} | sections.pop("training", {})
    return make_config(training=training, **sections)


def error_of(capsys: Capture) -> str:
    """The error line of the last run."""
    return capsys.readouterr().err.splitlines()[-1]


def never(*arguments: Any, **named: Any) -> Any:
    """In place of what must not be called."""
    raise AssertionError("measured again")


# --- how many steps a duration is ---


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        ("384 tokens", 6),  # a step has 4 · 16 tokens
        ("0.32k tokens", 5),
        ("2 tokens_per_parameter", 260),  # 8,304 parameters (test_train.py): 259.5 steps
        (
            "6.8M flops",
            2,
        ),  # 64 tokens of 52,608 FLOPs: 6 · 8,256 weights of products, 3,072 attention
        ("1.5 epochs", 9),  # 24 rows are 6 steps
    ],
)
def test_a_duration_is_so_many_steps(make_config: Make, duration: str, steps: int) -> None:
    config = load_config(lasting(make_config, duration, model={"vocab_size": 260}))
    assert count_steps(config, budget_of(config), rows_per_pass=24) == steps


@pytest.mark.slow
def test_a_run_of_a_duration_is_the_run_of_its_steps(
    make_config: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """384 tokens are 6 steps: warmup, validations and weights are those of max_steps 6."""
    assert run(make_config(), *elsewhere(tmp_path / "steps")) == 0
    with caplog.at_level(logging.INFO):
        assert run(lasting(make_config, "384 tokens"), *elsewhere(tmp_path)) == 0
    said = "training.duration 384 tokens: 6 steps; from now on this is the length"
    assert said in caplog.messages
    assert_same_run(tmp_path / "steps", tmp_path)


@pytest.mark.slow
def test_a_settled_duration_is_in_the_checkpoint_and_in_config_yaml(
    make_config: Make, tmp_path: Path
) -> None:
    assert run(lasting(make_config, "64 tokens")) == 0
    state = checkpoint_format.read(tmp_path / "checkpoints" / "final.ckpt")
    assert state["settled"] == {"training.duration": "64 tokens"}
    training = state["config"]["training"]
    assert (training["max_steps"], training["duration"]) == (1, None)
    written = tmp_path / "logs" / "tiny" / "config.yaml"
    assert written.read_text().startswith("# training.duration: 64 tokens was settled\n")
    assert load_config(written).training.max_steps == 1


# --- a time ---


@pytest.fixture
def six_steps(monkeypatch: Patch) -> None:
    """Every time that is measured is six steps."""
    monkeypatch.setattr(settle, "TIMED_SECONDS", 0.01)
    monkeypatch.setattr(settle, "steps_within", lambda *times: 6)


@pytest.mark.slow
def test_the_measurement_of_a_time_leaves_no_trace_in_the_run(
    make_config: Make, tmp_path: Path, six_steps: None, caplog: pytest.LogCaptureFixture
) -> None:
    """With dropout and three micro-batches per step; its steps are taken by another model."""
    hard = {"model": {"residual_dropout": 0.2}, "training": {"grad_accum_steps": 3}}
    assert run(make_config(**hard), *elsewhere(tmp_path / "steps")) == 0
    with caplog.at_level(logging.INFO):
        assert run(lasting(make_config, "20min", **hard)) == 0
    assert "training.duration 20min: measuring a step ..." in caplog.messages
    assert_same_run(tmp_path / "steps", tmp_path)


@pytest.mark.slow
def test_a_time_is_measured(make_config: Make, tmp_path: Path, monkeypatch: Patch) -> None:
    """A step of 0.2 s and no validations: 2 s are at most 10 steps, fewer by what the measurement
    took of them.
    """
    monkeypatch.setattr(settle, "TIMED_SECONDS", 0.01)
    step, validation = settle.time_step, settle.time_validation
    found = []
    monkeypatch.setattr(settle, "time_step", lambda *a, **b: found.append(step(*a, **b)) or 0.2)
    monkeypatch.setattr(settle, "time_validation", lambda *a: found.append(validation(*a)) or 0.0)
    assert run(lasting(make_config, "2s")) == 0
    max_steps = checkpoint_format.read(tmp_path / "checkpoints" / "final.ckpt")["step"]
    assert 1 <= max_steps <= 9
    assert 0 < found[0] < 1 and 0 < found[1] < 1, "what was really measured, in seconds"


# --- settled once ---


@pytest.mark.slow
def test_a_resumed_run_does_not_measure_again(
    make_config: Make, tmp_path: Path, monkeypatch: Patch, six_steps: None
) -> None:
    config = lasting(make_config, "20min")
    with monkeypatch.context() as patch:
        patch.setattr(settle, "measure_steps", lambda *arguments: 6)
        interrupt_at(patch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert run(config) == 130
    monkeypatch.setattr(settle, "measure_steps", never)
    assert run(config) == 0
    assert run(make_config(), *elsewhere(tmp_path / "steps")) == 0
    assert_same_run(tmp_path / "steps", tmp_path)
    assert checkpoint_format.read(tmp_path / "checkpoints" / "final.ckpt")["settled"]


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_checkpoint_does_not_measure_again(
    make_config: Make,
    tmp_path: Path,
    monkeypatch: Patch,
    six_steps: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Unless it is another run: here with another learning rate."""
    config = lasting(make_config, "20min")
    with monkeypatch.context() as patch:
        patch.setattr(RunRecord, "end", lambda *arguments, **named: None)  # as after SIGKILL
        patch.setattr("training.run.build_trainer", never)
        patch.setattr("training.run.Checkpoints", never)
        with pytest.raises(AssertionError):
            run(config)
    assert read_facts(tmp_path / "logs" / "tiny") is None, "it was killed before that"
    with monkeypatch.context() as patch:
        patch.setattr(RunRecord, "end", lambda *arguments, **named: None)
        interrupt_at(patch, 1, never)
        patch.setattr(settle, "measure_steps", lambda *arguments: 6)
        with pytest.raises(AssertionError):
            run(config)
    facts = read_facts(tmp_path / "logs" / "tiny")
    assert facts is not None and facts.settled == {"training.duration": "20min"}
    with monkeypatch.context() as patch:
        patch.setattr(settle, "measure_steps", lambda *arguments: 5)
        assert run(config, "training.lr=0.5", *elsewhere(tmp_path / "other")) == 0
        patch.setattr(settle, "measure_steps", never)
        with caplog.at_level(logging.INFO):
            assert run(config) == 0
    said = "settled before this run was killed: training.duration 20min is training.max_steps 6"
    assert said in caplog.messages


@pytest.mark.slow
def test_a_run_keeps_the_duration_that_it_began_with(
    make_config: Make, tmp_path: Path, capsys: Capture
) -> None:
    """More steps are asked for by their number."""
    config = lasting(make_config, "64 tokens")
    assert run(config) == 0
    assert run(config) == 0
    assert run(config, "training.duration=128 tokens") == 2
    assert error_of(capsys) == (
        "error: training.duration: is 128 tokens, but the run in "
        f"{tmp_path / 'checkpoints' / 'step-000001.ckpt'} began with a duration of 64 tokens. "
        "To change its length set training.max_steps (now 1) in place of training.duration."
    )
    assert run(config, "training.duration=null", "training.max_steps=2") == 0


# --- errors ---


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (
            {"max_steps": 6, "duration": "20min"},
            "cannot be combined with max_steps (6): both say how long the run is. "
            "Remove one; on the command line training.max_steps=null removes it.",
        ),
        (
            {"max_steps": None, "duration": "3 weeks"},
            "must be a number above 0 with a unit, got 3 weeks. Write for example 20min, 2h, "
            "3 epochs, 200M tokens, 20 tokens_per_parameter or 1e17 flops.",
        ),
    ],
)
def test_a_duration_that_cannot_be_is_an_error(
    make_config: Make, capsys: Capture, settings: dict, error: str
) -> None:
    config = make_config(training=settings)
    assert run(config) == 2
    line = next(
        number
        for number, text in enumerate(config.read_text().splitlines(), start=1)
        if "duration:" in text
    )
    assert error_of(capsys) == f"error: {config}:{line}: training.duration: {error}"


@pytest.mark.parametrize(
    ("duration", "sections", "error"),
    [
        (
            "3 epochs",
            {"data": {"streaming": True}},
            "3 epochs: the length of a stream is not known. "
            "Give tokens or a time, or data.streaming=false.",
        ),
        (
            "63 tokens",
            {},
            "63 tokens is 0.984 optimizer steps. It must be from 1 to 2,147,483,647 steps.",
        ),
        (
            "20min",
            {"hardware": {"devices": 2}},
            "a time is measured by one process, without the communication of several. "
            "Give epochs, tokens or flops, or set training.max_steps.",
        ),
    ],
)
def test_a_duration_of_no_known_number_of_steps_is_an_error(
    make_config: Make, capsys: Capture, duration: str, sections: dict, error: str
) -> None:
    assert run(lasting(make_config, duration, **sections)) == 2
    assert error_of(capsys) == f"error: training.duration: {error}"


def test_tokens_are_no_measure_of_fine_tuning(make_config: Make, capsys: Capture) -> None:
    config = lasting(make_config, "1M tokens", training={"train_on": "all"})
    assert finetune.main(["--config", str(config)]) == 2
    assert error_of(capsys) == (
        "error: training.duration: tokens, tokens_per_parameter and flops are only valid for "
        "train.py: rows of fine-tuning are filled unevenly. Give epochs or a time."
    )


def test_steps_null_needs_a_duration(make_config: Make, capsys: Capture) -> None:
    config = make_config(training={"max_steps": None})
    assert run(config) == 2
    assert error_of(capsys).endswith(
        "training.max_steps: null needs a duration. Set training.max_steps or training.duration."
    )


def test_a_settled_length_is_checked_against_the_schedule(make_config: Make) -> None:
    config = load_config(
        lasting(make_config, "3 epochs", training={"schedule": "plateau", "val_every_steps": 9})
    )
    with pytest.raises(UserError, match="must be at most max_steps"):
        settle.with_max_steps(config, 8)


# --- before a run ---


@pytest.mark.slow
def test_a_plan_tells_the_steps_of_a_duration(
    make_config: Make, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    """For epochs it reads the data: 1 epoch is as often as the rows of the run say."""
    monkeypatch.setattr("tinylm.planning.probes.MEASURED_SECONDS", 0.01)
    assert run(lasting(make_config, "384 tokens"), "--plan") == 0
    out, err = capsys.readouterr()
    assert "384 for the whole run" in out
    assert "training.duration 384 tokens: 6 steps" in err
    for duration in ("1 epochs", "10s"):
        assert run(lasting(make_config, duration), "--plan") == 0
        assert f"training.duration {duration}: " in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()


def test_rows_and_settings_are_printed_without_settling(
    make_config: Make, capsys: Capture, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(settle, "settle_duration", never)
    config = lasting(make_config, "20min")
    assert run(config, "--show-rows", "2") == 0
    assert capsys.readouterr().out.count("micro-batch 0") == 2
    assert run(config, "--print-config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)["training"]
    assert (printed["max_steps"], printed["duration"]) == (None, "20min")


# --- hardware.precision auto ---


@pytest.mark.slow
def test_auto_precision_is_chosen_once_and_said_in_the_first_line(
    make_config: Make, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """A run of 6 steps, then 2 more: the second process takes the precision of the checkpoint."""
    config = make_config(hardware={"precision": "auto"})
    with monkeypatch.context() as patch:
        patch.setattr(settle, "choose_precision", lambda *arguments: ("bf16", "a reason"))
        assert run(config) == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert first == "device: cpu (requested), precision bf16 (auto: a reason)"
    state = checkpoint_format.read(tmp_path / "checkpoints" / "final.ckpt")
    assert state["config"]["hardware"]["precision"] == "bf16"
    assert state["settled"] == {"hardware.precision": "auto"}
    facts = read_facts(tmp_path / "logs" / "tiny")
    assert facts is not None and facts.precision == "bf16"
    monkeypatch.setattr(settle, "choose_precision", never)
    assert run(config, "training.max_steps=8") == 0
    said = "precision bf16 (auto: as its checkpoint has it)"
    assert capsys.readouterr().err.splitlines()[0].endswith(said)


@pytest.mark.parametrize(("ratio", "chosen"), [(1.5, "bf16"), (1.01, "32"), (0.57, "32")])
def test_bf16_must_be_faster_than_32_on_a_cpu(
    make_config: Make, monkeypatch: Patch, ratio: float, chosen: str
) -> None:
    """0.57 is what a CPU without AMX gave."""
    monkeypatch.setattr(precision, "measure_ratio", lambda config, device: ratio)
    config = load_config(make_config())
    assert precision.choose_precision(config, "cpu")[0] == chosen


def test_the_ratio_of_two_precisions_is_measured(make_config: Make, monkeypatch: Patch) -> None:
    """Two matrix products of the same shapes differ by less than a factor of 100."""
    monkeypatch.setattr(precision, "MEASURED_SECONDS", 0.0)
    assert 0.01 < precision.measure_ratio(load_config(make_config()), "cpu") < 100


@pytest.mark.parametrize(
    ("has_bf16", "strategy", "chosen"),
    [(True, "auto", "bf16"), (False, "auto", "16"), (False, "fsdp", "32")],
)
def test_a_gpu_decides_by_what_it_has(
    make_config: Make, monkeypatch: Patch, has_bf16: bool, strategy: str, chosen: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **options: has_bf16)
    config = load_config(make_config(hardware={"strategy": strategy}))
    assert precision.choose_precision(config, "cuda")[0] == chosen


# --- training.micro_batch_size auto ---


@pytest.mark.slow
def test_an_auto_micro_batch_keeps_the_rows_of_a_step(
    make_config: Make, tmp_path: Path, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 1, 2, 4 and 8 rows 4 are nearly as fast as 8, and divide 12: three micro-batches of 4. The
    run is the one with these numbers written; a resumed one has them too.
    """
    auto = {"micro_batch_size": "auto", "batch_size": 12}
    config = make_config(training=auto)
    with monkeypatch.context() as patch:
        speeds = {1: 50.0, 2: 80.0, 4: 99.0, 8: 100.0}
        patch.setattr(settle, "measure_sizes", lambda *arguments: speeds)
        with caplog.at_level(logging.INFO):
            assert run(config, "training.max_steps=4") == 0
    said = "training.micro_batch_size auto: 4 rows (tokens/s: 1 rows 50, 2 rows 80, 4 rows 99, 8 rows 100)"
    assert said in caplog.messages
    monkeypatch.setattr(settle, "measure_sizes", never)
    assert run(config, "training.max_steps=4") == 0, "complete"
    state = checkpoint_format.read(tmp_path / "checkpoints" / "final.ckpt")
    assert state["settled"] == {"training.micro_batch_size": "auto of 12 rows"}
    written = make_config("written.yaml", training={"micro_batch_size": 4, "grad_accum_steps": 3})
    assert run(written, "training.max_steps=4", *elsewhere(tmp_path / "written")) == 0
    assert_same_run(tmp_path / "written", tmp_path)


@pytest.mark.slow
def test_a_resumed_run_keeps_its_batch(make_config: Make, tmp_path: Path, capsys: Capture) -> None:
    assert run(make_config(), "training.max_steps=2") == 0
    auto = make_config(training={"micro_batch_size": "auto", "batch_size": 8})
    assert run(auto) == 2
    assert error_of(capsys) == (
        "error: training.batch_size: is 8, but the run in "
        f"{tmp_path / 'checkpoints' / 'step-000002.ckpt'} has 4 rows. Set it back."
    )


@pytest.mark.slow
def test_a_micro_batch_is_measured(make_config: Make, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr("tinylm.planning.probes.MEASURED_SECONDS", 0.0)
    assert run(make_config(training={"micro_batch_size": "auto", "batch_size": 2})) == 0
    training = checkpoint_format.read(tmp_path / "checkpoints" / "final.ckpt")["config"]["training"]
    assert training["micro_batch_size"] * training["grad_accum_steps"] == 2


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (
            {"micro_batch_size": "auto"},
            "training.micro_batch_size: auto needs batch_size, the rows of an optimizer step. "
            "Set training.batch_size, for example to 64",
        ),
        (
            {"batch_size": 8},
            "training.batch_size: only valid for micro_batch_size auto (micro_batch_size is 4). "
            "Set training.micro_batch_size and training.grad_accum_steps, or micro_batch_size to auto",
        ),
        (
            {"micro_batch_size": "auto", "batch_size": 8, "grad_accum_steps": 2},
            "training.grad_accum_steps: cannot be combined with micro_batch_size auto, which "
            "decides it. Remove it",
        ),
        ({"micro_batch_size": "fast"}, 'must be a whole number or auto, got "fast"'),
        ({"micro_batch_size": 0}, "must be at least 1 or auto, got 0"),
    ],
)
def test_an_auto_micro_batch_needs_the_rows_of_a_step(
    make_config: Make, settings: dict, error: str
) -> None:
    with pytest.raises(UserError) as raised:
        load_config(make_config(training=settings))
    assert error in str(raised.value)


def test_fine_tuning_has_no_auto_micro_batch(make_config: Make, capsys: Capture) -> None:
    auto = {"micro_batch_size": "auto", "batch_size": 8, "train_on": "all"}
    assert finetune.main(["--config", str(make_config(training=auto))]) == 2
    assert error_of(capsys) == (
        "error: training.micro_batch_size: auto is not supported for fine-tuning, whose memory is "
        "not planned. Set training.micro_batch_size to a number of rows."
    )
