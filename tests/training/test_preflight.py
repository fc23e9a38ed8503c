"""The flags before a run: --plan, --overfit-one-batch, --find-lr, --find-batch-size; and a run
whose memory ends (FAULTS: C7).
"""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import model
import train
from tinylm.checkpoint import format as checkpoint_format
from tinylm.common.errors import UserError
from tinylm.config.loader import load_config
from tinylm.model.decoder import Decoder
from tinylm.planning import batch_size, memory, probes
from tinylm.planning.batch_size import measure_sizes
from tinylm.planning.memory_plan import plan_run, with_settings
from training import preflight

Make = Callable[..., Path]
Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def fast(monkeypatch: Patch) -> None:
    """Measure for a hundredth of a second."""
    monkeypatch.setattr(probes, "MEASURED_SECONDS", 0.01)


def run(config: Path, *arguments: str) -> int:
    """The exit code of train.py in this process."""
    return train.main(["--config", str(config), *arguments])


def refused(config: Path, capsys: Capture, *arguments: str) -> str:
    """The error line of a command that ends with 2."""
    assert run(config, *arguments) == 2
    return next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))


def left(folder: Path) -> set[str]:
    """The files in the folder of a test, except the config and its text."""
    return {path.name for path in folder.iterdir()} - {"config.yaml", "corpus.txt"}


# --- --plan -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_plan_is_printed_and_nothing_written(
    make_config: Make, tmp_path: Path, capsys: Capture, fast: None
) -> None:
    """8,304 parameters (derived in test_train.py) and 6 steps of 4 rows of 16 tokens: 384 tokens,
    and 20 a parameter would be 166k.
    """
    path = make_config()
    assert run(path, "--plan") == 0
    out, err = capsys.readouterr()
    rows = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in out.splitlines())
    parts = ["program", "weights", "gradients", "optimizer", "activations", "logits", "scratch"]
    assert list(rows) == ["parameters", "FLOPs", "tokens", "checkpoints", "memory", *parts, "time"]
    assert rows["parameters"] == "8,304"
    assert rows["FLOPs"] == "52.6k per token, 20.2M for the whole run"
    assert (
        rows["tokens"]
        == "384 for the whole run, 0.0462 per parameter (compute-optimal: about 20, 166k)"
    )
    assert (
        rows["checkpoints"] == "99.7 kB each, at most 4 at a time, 398.7 kB (training.keep_last 2)"
    )
    assert re.fullmatch(r"\d+\.\d [MG]B at the peak, \d+\.\d GB available", rows["memory"])
    assert rows["weights"] == "33.2 kB"
    assert re.fullmatch(
        r"\d+s of steps, without validation \(\S+ tokens/s measured, \d+% of the FLOPs of bare matrix products\)",
        rows["time"],
    )
    assert err.startswith("device: cpu (requested)")
    assert left(tmp_path) == set()


@pytest.mark.slow
def test_a_run_that_does_not_fit_is_not_measured_and_gets_overrides(
    make_config: Make, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    """64 rows, and memory for 32 in two parts; the overrides of the message make it fit."""
    path = make_config(training={"micro_batch_size": 64})
    config = with_settings(load_config(path), {"model.vocab_size": 260})
    half = {"training.micro_batch_size": 32, "training.grad_accum_steps": 2}
    monkeypatch.setattr(
        memory,
        "available_bytes",
        lambda device: plan_run(with_settings(config, half), "cpu").peak,
    )
    assert run(path, "--plan") == 2
    out, err = capsys.readouterr()
    assert (
        out.splitlines()[-1].split(maxsplit=1)[1].strip()
        == "not measured, because the run does not fit"
    )
    error = re.search(
        r"error: memory: a step needs \S+ [MG]B, but only \S+ [MG]B are available\. It fits with: (.+)\.\n",
        err,
    )
    assert error is not None
    assert error[1].split() == ["training.micro_batch_size=32", "training.grad_accum_steps=2"]
    assert left(tmp_path) == set()


@pytest.mark.slow
def test_if_nothing_fits_a_smaller_model_is_suggested(
    make_config: Make, capsys: Capture, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1)
    assert refused(make_config(), capsys, "--plan").endswith(
        "are available. Use a much smaller model: lower model.d_model and model.vocab_size."
    )


@pytest.mark.slow
def test_a_plan_without_known_memory(
    make_config: Make, capsys: Capture, monkeypatch: Patch, fast: None
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    assert run(make_config(), "--plan", "hardware.compile=true") == 0
    out, err = capsys.readouterr()
    assert "at the peak, unknown how much is available" in out
    assert "without hardware.compile, which is faster and mostly needs less memory\n" in err


@pytest.mark.slow
def test_the_vocabulary_is_known_before_there_is_a_tokenizer(
    make_config: Make, tmp_path: Path, capsys: Capture, fast: None
) -> None:
    """A bpe's size is a setting, a char's the number of characters; for a mixture of experts the
    active parameters are printed.
    """
    path = make_config(
        data={"dataset": str(tmp_path / "not_there_yet.txt")},
        tokenizer={"kind": "bpe", "vocab_size": 300},
    )
    assert run(path, "--plan") == 0
    assert capsys.readouterr().out.split()[1] == f"{8304 + 40 * 16:,}"
    path = make_config(data={"dataset": str(tmp_path / "corpus.txt")}, tokenizer={"kind": "char"})
    assert run(path, "--plan") == 0
    characters = len(set((tmp_path / "corpus.txt").read_text()) - {"\n"})
    assert capsys.readouterr().out.split()[1] == f"{8304 - 260 * 16 + (characters + 2) * 16:,}"
    assert run(path, "--plan", "model.moe={n_experts: 4, top_k: 1}") == 0
    assert re.match(r"parameters +[\d,]+, [\d,]+ of them active per token", capsys.readouterr().out)
    assert left(tmp_path) == set()


@pytest.mark.slow
def test_without_its_tokenizer_a_run_is_planned_by_the_vocabulary_size(
    make_config: Make, capsys: Capture, monkeypatch: Patch, fast: None
) -> None:
    def unreachable(*_: Any) -> None:
        raise UserError("tokenizer.path", "gpt2: cannot be reached", "")

    monkeypatch.setattr(preflight, "prepare_tokenizer", unreachable)
    path = make_config(tokenizer={"path": "gpt2"})
    message = (
        "error: tokenizer.path: gpt2: cannot be reached. To plan without the tokenizer, set its "
        "size: model.vocab_size=50257."
    )
    assert refused(path, capsys, "--plan") == message
    assert run(path, "--plan", "model.vocab_size=50257") == 0


def test_what_cannot_be_planned_is_refused(
    make_config: Make, capsys: Capture, monkeypatch: Patch
) -> None:
    assert refused(make_config(), capsys, "--plan", "lora={r: 2}").startswith(
        "error: lora: the flags before a run do not support adapters. Remove the lora section"
    )
    monkeypatch.setattr(preflight, "find_initial_model", lambda *_: SimpleNamespace(is_hf=True))
    message = refused(make_config(), capsys, "--plan", "training.init_from=hf:gpt2")
    assert (
        message
        == "error: training.init_from: the flags before a run do not support a Hugging Face model. "
        "Remove training.init_from."
    )


def test_only_one_thing_is_asked_for_at_a_time(make_config: Make, capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(make_config(), "--plan", "--find-lr")
    assert "argument --find-lr: not allowed with argument --plan" in capsys.readouterr().err


# --- --overfit-one-batch ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_that_can_learn_learns_one_batch(
    make_config: Make, tmp_path: Path, capsys: Capture
) -> None:
    """Nothing is left but the encoded text in the cache."""
    assert run(make_config(), "--overfit-one-batch", "200", "model.residual_dropout=0.5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"step     1  loss 5\.\d{4}", lines[0])
    assert re.fullmatch(
        r"learned: the loss of one batch fell from 5\.\d{4} to 0\.\d{4} in \d+ steps, below 10% of the first",
        lines[-1],
    )
    assert left(tmp_path) == {"cache"}


@pytest.mark.slow
def test_the_probe_starts_from_the_initial_model(
    make_config: Make, tmp_path: Path, capsys: Capture
) -> None:
    """After 60 steps on the whole text the first loss is far below ln 260 = 5.56; a shape that it
    has not is refused, as in a run.
    """
    path = make_config(training={"max_steps": 60, "val_every_steps": 60})
    assert run(path) == 0
    capsys.readouterr()
    base = f"training.init_from={tmp_path / 'checkpoints' / 'final.ckpt'}"
    run(path, "--overfit-one-batch", "1", base)
    assert float(capsys.readouterr().out.split()[3]) < 4.5
    assert refused(path, capsys, "--plan", base, "model.n_layers=3").startswith(
        "error: model.n_layers: must be 1, as in training.init_from ("
    )


def test_a_batch_that_is_not_learned_ends_with_3(make_config: Make, capsys: Capture) -> None:
    assert run(make_config(), "--overfit-one-batch", "2") == 3
    pattern = (
        r"error: not learned: the loss of one batch fell from \S+ to \S+ in 2 steps, and must be "
        r"below 10% of the first\. Raise training\.lr"
    )
    assert re.search(pattern, capsys.readouterr().err)


@pytest.mark.parametrize("value", ["0", "-3", "training.lr=1e-3"])
def test_what_is_no_number_of_steps_is_refused(
    make_config: Make, capsys: Capture, value: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(make_config(), f"--overfit-one-batch={value}")
    expected = f"error: argument --overfit-one-batch: must be a number of steps, got {value}"
    assert expected in capsys.readouterr().err


# --- --find-lr --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_learning_rate_is_read_from_a_curve(
    make_config: Make, tmp_path: Path, capsys: Capture
) -> None:
    """More steps than the run has; Muon's own rate keeps its ratio."""
    assert (
        run(make_config(training={"optimizer": "muon", "muon_lr": 0.02, "lr": 0.01}), "--find-lr")
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Loss over the learning rate"
    assert re.fullmatch(r" +1e-05 +\d\S*", lines[-3])
    rates = re.fullmatch(r"training\.lr=(\S+) training\.muon_lr=(\S+)", lines[-1])
    assert rates is not None
    assert 1e-4 < float(rates[1]) < 1
    assert float(rates[2]) == pytest.approx(2 * float(rates[1]), rel=0.1)
    assert left(tmp_path) == {"cache"}


def test_a_loss_that_is_no_number_gives_no_learning_rate(
    make_config: Make, capsys: Capture, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(probes.Probe, "step", lambda self, batches, share: float("nan"))
    assert run(make_config(), "--find-lr") == 3
    assert (
        "error: the first loss is not a finite number. Look at the data: python train.py --config ... --show-rows 3"
        in capsys.readouterr().err
    )


# --- --find-batch-size ------------------------------------------------------------------------------------------------


def speeds_of(monkeypatch: Patch, speeds: dict[int, float], limit: int) -> list[int]:
    """Give each number of rows a speed, and memory for `limit` of them; return the measured sizes."""
    measured: list[int] = []

    def measure(decoder: Decoder, config: Any, device: str) -> probes.Speed:
        rows = config.training.micro_batch_size
        measured.append(rows)
        if rows > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return probes.Speed(speeds[rows], rows)

    monkeypatch.setattr(batch_size, "measure_speed", measure)
    return measured


@pytest.mark.slow
def test_sizes_are_measured_until_they_are_not_worthwhile(
    make_config: Make, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    """8 and 16 rows are not 5% faster than 4, so that 32 are not tried; a step of 6 rows is not
    four and a bit more: parts of 2.
    """
    measured = speeds_of(monkeypatch, {1: 100.0, 2: 180.0, 4: 240.0, 8: 245.0, 16: 250.0}, 1000)
    assert run(make_config(training={"micro_batch_size": 6}), "--find-batch-size") == 0
    out, err = capsys.readouterr()
    assert measured == [1, 2, 4, 8, 16]
    table = [line.split() for line in out.splitlines()]
    assert table[0] == ["rows", "planned", "memory", "tokens/s"]
    assert [(row[0], row[-1]) for row in table[1:-1]] == [
        ("1", "100"),
        ("2", "180"),
        ("4", "240"),
        ("8", "245"),
        ("16", "250"),
    ]
    assert out.splitlines()[-1] == "training.micro_batch_size=2 training.grad_accum_steps=3"
    assert "more than 4 rows are less than 5% faster; for 6 rows per step, as configured:\n" in err
    assert left(tmp_path) == set()


@pytest.mark.slow
def test_the_plan_bounds_what_is_tried(
    make_config: Make, capsys: Capture, monkeypatch: Patch
) -> None:
    measured = speeds_of(monkeypatch, {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}, 1000)
    path = make_config()
    config = with_settings(
        load_config(path), {"model.vocab_size": 260, "training.micro_batch_size": 6}
    )
    monkeypatch.setattr(memory, "available_bytes", lambda device: plan_run(config, "cpu").peak)
    assert run(path, "--find-batch-size") == 0
    assert measured == [1, 2, 4]
    assert "by the plan: 4 rows\n" in capsys.readouterr().err


def test_a_size_that_does_not_fit_after_all_is_omitted(
    make_config: Make, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    speeds_of(monkeypatch, {1: 1.0, 2: 2.0}, 2)
    config = with_settings(load_config(make_config()), {"model.vocab_size": 260})
    with caplog.at_level(logging.INFO):
        assert measure_sizes(config, "cpu", 64) == {1: 1.0, 2: 2.0}
    assert caplog.messages == ["4 rows do not fit after all"]


@pytest.mark.slow
def test_a_single_row_that_does_not_fit_is_an_error(
    make_config: Make, capsys: Capture, monkeypatch: Patch
) -> None:
    speeds_of(monkeypatch, {}, 0)
    assert refused(make_config(), capsys, "--find-batch-size").startswith(
        "error: out of memory: a micro-batch of 1 rows (training.micro_batch_size) of 16"
    )
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1)
    message = refused(make_config(), capsys, "--find-batch-size")
    assert re.match(
        r"error: memory: not even one row fits into \S+ [MG]B\. Use --plan in place of "
        r"--find-batch-size: it shows what to change\.",
        message,
    )
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    message = refused(make_config(), capsys, "--find-batch-size")
    assert (
        message
        == "error: --find-batch-size: the memory of cpu is not known on this machine. Try values of "
        "training.micro_batch_size by hand."
    )


# --- a run whose memory ends ------------------------------------------------------------------------------------------

CPU_ERROR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 2621440000 bytes."
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.44 GiB."),
        RuntimeError(CPU_ERROR),
    ],
    ids=["cuda", "cpu"],
)
def test_a_run_out_of_memory_ends_with_one_line_and_its_checkpoint_continues(
    make_config: Make, tmp_path: Path, capsys: Capture, monkeypatch: Patch, error: RuntimeError
) -> None:
    """C7: at step 4, two after the last checkpoint; the same command then continues from there."""
    path = make_config()
    true_loss = model.LanguageModule.batch_loss

    def batch_loss(self: model.LanguageModule, *args: Any, **kwargs: Any) -> Any:
        if self.training and self.progress.step == 3:
            raise error
        return true_loss(self, *args, **kwargs)

    monkeypatch.setattr(model.LanguageModule, "batch_loss", batch_loss)
    message = refused(path, capsys)
    assert message.startswith(
        "error: out of memory: a micro-batch of 4 rows (training.micro_batch_size) of 16 tokens "
        "(training.seq_len) does not fit: "
    )
    intact = f"The checkpoints in {tmp_path / 'checkpoints'} are intact."
    assert message.endswith(
        f"Try training.micro_batch_size=2 training.grad_accum_steps=2; train.py --plan shows what a run needs. {intact}"
    )
    assert checkpoint_format.read(tmp_path / "checkpoints" / "last.ckpt")["step"] in (2, 3)
    monkeypatch.undo()
    assert run(path) == 0
    assert checkpoint_format.read(tmp_path / "checkpoints" / "final.ckpt")["step"] == 6
