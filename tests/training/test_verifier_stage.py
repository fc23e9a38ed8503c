"""A verifier is trained, resumed exactly (FAULTS A12, D1) and read back; what it is not for is refused."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import eval_val
import finetune
import infer
import list as list_program
import train
from tests import programs
from tests.training.test_train import (
    Capture,
    Patch,
    assert_same_run,
    bytes_of,
    curve,
    elsewhere,
    interrupt_at,
)
from tinylm.checkpoint import format as checkpoint_format
from tinylm.checkpoint import load as checkpoint_load
from tinylm.common.errors import UserError
from tinylm.config.loader import load_config
from tinylm.objectives.verifier import VerifierScore
from training.stages.verifier import VerifierData, VerifierModule

Make = Callable[..., Path]
FEW = {
    "train_docs": 6,
    "val_docs": 2,
}  # problems, as each answer of an untrained model is 256 tokens long
TINY = {"n_layers": 1, "d_model": 16, "n_heads": 2, "max_seq_len": 64}


def settings_of(folder: Path, **sections: Any) -> dict[str, Any]:
    """A tiny run whose files are under `folder`."""
    settings: dict[str, Any] = {
        "model": TINY | {"residual_dropout": 0.2, "attention_dropout": 0.2},
        "data": {"dataset": str(folder / "rows.jsonl"), "val_fraction": 0.25, "cache_dir": str(folder / "cache")},
        "training": {
            "seq_len": 32, "micro_batch_size": 2, "grad_accum_steps": 3, "max_steps": 6, "val_every_steps": 3, "log_every_steps": 1, "save_every_steps": 2,
            "lr": 1e-2, "checkpoint_dir": str(folder / "checkpoints"), "log_dir": str(folder / "logs"), "run_name": "tiny",
        },
        "hardware": {"accelerator": "cpu", "threads": 1},
        "verifier": {"n_wrong": 2},
    }  # fmt: skip
    for section, values in sections.items():
        settings[section] = values if values is None else settings.get(section, {}) | values
    return settings


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes 24 sums as rows, and a config."""
    rows = [{"prompt": f"{i} + {i % 5} =", "completion": f" {i + i % 5}"} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )

    def write(name: str = "config.yaml", **sections: Any) -> Path:
        (tmp_path / name).write_text(
            yaml.safe_dump(settings_of(tmp_path, **sections)), encoding="utf-8"
        )
        return tmp_path / name

    return write


@pytest.fixture
def writer(tmp_path: Path, make: Make) -> Path:
    """The checkpoint of a decoder that writes, of the verifier's shape."""
    (tmp_path / "corpus.txt").write_text(
        "".join(f"{i} + {i % 5} = {i + i % 5}\n" for i in range(40)), encoding="utf-8"
    )
    data = {"dataset": str(tmp_path / "corpus.txt")}
    files = {
        "checkpoint_dir": str(tmp_path / "base"),
        "run_name": "base",
        "max_steps": 2,
        "grad_accum_steps": 1,
    }
    assert (
        train.main(["--config", str(make("base.yaml", verifier=None, data=data, training=files))])
        == 0
    )
    return tmp_path / "base" / "final.ckpt"


def run(config: Path, *arguments: str) -> int:
    """The exit code of finetune.py in this process."""
    return finetune.main(["--config", str(config), *arguments])


def refused(config: Path, capsys: Capture, *arguments: str) -> str:
    """The one line of a run that exits with 2."""
    capsys.readouterr()
    assert run(config, *arguments) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return error


# --- what a run does --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_verifier_is_scored_alone_as_in_training_and_on_other_pairs(
    make: Make, tmp_path: Path, capsys: Capture
) -> None:
    """On the rows of its config: the numbers of metrics.csv. On labelled rows: theirs alone."""
    config = make()
    assert run(config) == 0
    with open(tmp_path / "logs" / "tiny" / "metrics.csv", newline="", encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    command = ["--ckpt", str(tmp_path / "checkpoints" / "final.ckpt"), "--config", str(config)]
    capsys.readouterr()
    assert eval_val.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    columns = [name for name in last if name.startswith("val_") and last[name]]
    assert set(columns) > {"val_loss", "val_accuracy", "val_auc"}
    for name in columns:
        assert found[name] == pytest.approx(float(last[name]), rel=1e-5, nan_ok=True), name
    pairs = [
        {"prompt": f"{i} + 1 =", "completion": f" {i + 1 + i % 2}", "label": 1 - i % 2, "who": "me"}
        for i in range(8)
    ]
    others = tmp_path / "others.jsonl"
    others.write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    assert eval_val.main([*command, f"data.val_dataset={others}"]) == 0
    printed = capsys.readouterr()
    assert "on 8 answers" in printed.out and "val_majority 0.5000" in printed.out
    assert "columns not read: who" in printed.err


@pytest.mark.slow
def test_a_run_learns_to_tell_right_from_wrong(make: Make, tmp_path: Path, capsys: Capture) -> None:
    """Nine is always right, other numbers are always wrong, which is learned quickly. One of three
    pairs is right: the majority is 2/3.
    """
    config = make(
        training={
            "max_steps": 150,
            "val_every_steps": 75,
            "micro_batch_size": 8,
            "grad_accum_steps": 1,
        },
        model={"residual_dropout": 0.0},
    )
    rows = [{"prompt": f"no {i}", "completion": "It is 9."} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    assert run(config) == 0
    output = capsys.readouterr()
    final = tmp_path / "checkpoints" / "final.ckpt"
    assert output.out == f"{final}\n"
    assert output.err.startswith("device: cpu (requested)")
    assert "problems with " in output.err and "8 problems per step, 150 steps" in output.err
    assert (
        output.err.splitlines()[-1]
        == f"next: python infer.py --ckpt MODEL --prompt PROBLEM --best-of 8 --verifier {final}"
    )
    with open(tmp_path / "logs" / "tiny" / "metrics.csv", newline="", encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    numbers = {
        name: float(last[name])
        for name in (
            "val_accuracy",
            "val_accuracy_low",
            "val_accuracy_high",
            "val_majority",
            "val_auc",
            "accuracy",
        )
    }
    assert numbers["val_accuracy"] == 1 == numbers["val_auc"] and numbers["accuracy"] == 1
    assert (
        numbers["val_majority"] == pytest.approx(2 / 3)
        and numbers["val_majority"] < numbers["val_accuracy_low"] < 1
    )
    assert (last["val_ppl"], last["val_bpb"]) == ("", "")


@pytest.mark.slow
def test_validation_is_what_the_saved_verifier_makes_of_each_pair_alone(
    make: Make, tmp_path: Path
) -> None:
    """The oracle reads every pair by itself: the mean of -log of the share of the odds, and the
    score of the probabilities up to the width of a bin.
    """
    config_file = make()
    assert run(config_file) == 0
    loaded = checkpoint_load.load_verifier(tmp_path / "checkpoints" / "final.ckpt")
    config = load_config(config_file)
    data = VerifierData(config, loaded.tokenizer)
    data.prepare()
    losses, probabilities, right = [], [], []
    for batch in data.val_dataset():
        for ids, mask, label, departs in zip(
            batch["input_ids"],
            batch["attention_mask"],
            batch["label"],
            batch["error_mask"],
            strict=True,
        ):
            with torch.no_grad():
                odds = loaded.model.error_logits(ids[None, mask], mask[None, mask])[0].exp()
            losses.append(
                torch.log((1 + odds.sum()) / (1 if label else odds[departs[mask]].sum())).item()
            )
            probabilities.append(1 / (1 + odds.sum().item()))
            right.append(bool(label))
    score = VerifierScore.of(np.array(probabilities), np.array(right))
    assert score.n == 3 * len(data.val_problems) > 6
    assert float.fromhex(curve(tmp_path, "val_loss")[6]) == pytest.approx(np.mean(losses), abs=1e-5)
    assert float.fromhex(curve(tmp_path, "val_accuracy")[6]) == pytest.approx(
        score.accuracy, abs=1e-9
    )
    assert float.fromhex(curve(tmp_path, "val_calibration_error")[6]) == pytest.approx(
        score.calibration_error, abs=0.01
    )


@pytest.mark.slow
def test_the_loss_does_not_depend_on_how_a_step_is_divided(make: Make, tmp_path: Path) -> None:
    """6 problems a step as 1 x 6 and 3 x 2: the same pairs in the same step, so the same means up to rounding."""
    curves = []
    for rows, parts in ((6, 1), (2, 3)):
        folder, shape = (
            tmp_path / f"{rows}x{parts}",
            {"residual_dropout": 0.0, "attention_dropout": 0.0},
        )
        assert (
            run(
                make(model=shape, training={"micro_batch_size": rows, "grad_accum_steps": parts}),
                *elsewhere(folder),
            )
            == 0
        )
        curves.append(
            [
                [float.fromhex(x) for x in curve(folder, name).values()]
                for name in ("train_loss", "grad_norm", "val_loss", "accuracy")
            ]
        )
    for ours, theirs in zip(*curves, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_its_tokenizer_is_learned_from_problems_and_answers(
    kind: str, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And is in the checkpoint; a second start finds the run complete with it."""
    config = make(
        tokenizer={"kind": kind} | ({"vocab_size": 262} if kind == "bpe" else {}),
        training={"max_steps": 1},
    )
    assert run(config) == 0
    tokenizer = checkpoint_load.load_verifier(tmp_path / "checkpoints" / "final.ckpt").tokenizer
    text = "3 + 3 = 6"
    assert (
        tokenizer.decode(tokenizer.encode(text)) == text
        and tokenizer.vocab_size == {"byte": 260, "char": 16, "bpe": 262}[kind]
    )
    assert f"; tokenizer {kind}, vocabulary {tokenizer.vocab_size}\n" in capsys.readouterr().err
    assert run(config, "training.max_steps=2") == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_it_starts_from_the_weights_of_a_decoder(
    kind: str, make: Make, writer: Path, tmp_path: Path
) -> None:
    """With a learning rate of next to nothing the blocks are still the decoder's, and the head of
    kind decoder too.
    """
    config = make(
        model={"n_layers": 1},
        training={"init_from": str(writer), "lr": 1e-30, "max_steps": 1},
        verifier={"kind": kind},
    )
    assert run(config) == 0
    loaded, base = (
        checkpoint_load.load_verifier(tmp_path / "checkpoints" / "final.ckpt"),
        checkpoint_format.read(writer)["weights"],
    )
    ours = loaded.model.state_dict()
    assert ("head.weight" in ours) == (kind == "decoder")
    for name in ours:
        assert name.startswith("suspicion.") or torch.equal(ours[name], base[name]), name


# --- exact resume -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_stopped_run_goes_on_to_the_last_bit(
    kind: str, make: Make, writer: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    """A12, C1: SIGTERM in the second of three micro-batches of step 4, with dropout; then equal to
    an uninterrupted run.
    """
    config = make()
    if kind == "decoder":
        config = make(training={"init_from": str(writer)}, verifier={"kind": kind})
    assert run(config, *elsewhere(tmp_path / "calm")) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3 * 3 + 2, lambda: os.kill(os.getpid(), signal.SIGTERM), VerifierModule)
        assert run(config) == 143
    assert run(config) == 0
    assert_same_run(tmp_path / "calm", tmp_path)
    for name in ("accuracy", "val_accuracy", "val_auc", "val_calibration_error"):
        assert curve(tmp_path / "calm", name) == curve(tmp_path, name) != {}
    assert run(config) == 0, "complete"


@pytest.mark.slow
def test_killed_while_a_model_writes_answers_and_while_training_it_goes_on_to_the_last_bit(
    make: Make, writer: Path, tmp_path: Path
) -> None:
    """A12: SIGKILL after a few answered problems, then at two steps; answers, curve and weights
    equal an uninterrupted run's.
    """
    config = make(verifier={"n_wrong": 1, "n_sampled": 3, "sampled_from": str(writer)}, data=FEW)
    assert (
        run(config, *elsewhere(tmp_path / "calm"), f"data.cache_dir={tmp_path / 'calm' / 'cache'}")
        == 0
    )
    command = [sys.executable, "finetune.py", "--config", str(config)]
    metrics = tmp_path / "logs" / "tiny" / "metrics.csv"
    until = (
        lambda: sum(size(path) for path in (tmp_path / "cache").glob("answers-*")) > 400,
        lambda: size(metrics) > 500,
        lambda: size(metrics) > 900,
    )
    for enough in until:
        process = programs.Program(
            command, cwd=programs.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            while process.poll() is None and not enough():
                time.sleep(0.01)
            assert process.poll() is None, "it must not have ended by itself"
        finally:
            process.kill()
            process.wait()
    assert run(config) == 0
    assert_same_run(tmp_path / "calm", tmp_path)
    answers = [
        sorted(path.read_bytes() for path in (folder / "cache").glob("answers-*"))
        for folder in (tmp_path / "calm", tmp_path)
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 2


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_rows(
    make: Make, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """D1: exit code 3, the step and its problems are named, and nothing is saved."""
    interrupt_at(monkeypatch, 3 * 2 + 1, lambda: float("nan"), VerifierModule)
    assert run(make()) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: step 3: the loss is nan; rows at [[") and "rows.jsonl:" in error
    assert checkpoint_format.latest_valid(tmp_path / "checkpoints").name == "step-000002.ckpt"


@pytest.mark.slow
def test_a_run_is_not_resumed_with_other_rows(make: Make, tmp_path: Path, capsys: Capture) -> None:
    config = make()
    assert run(config, "training.max_steps=2") == 0
    path = tmp_path / "rows.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("0 =", "0 -"), encoding="utf-8")
    assert " data (" in refused(config, capsys) and "when it was saved" in refused(config, capsys)
    assert "verifier.n_wrong was 2 when it was saved, this run has 3" in refused(
        config, capsys, "verifier.n_wrong=3"
    )


# --- answers of a model ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_is_asked_once(make: Make, writer: Path, tmp_path: Path, capsys: Capture) -> None:
    """The base writes three answers to each problem, kept in the cache: a second run asks nothing
    and sees the same pairs.
    """
    config = make(
        verifier={"n_wrong": 0, "n_sampled": 3, "sampled_from": str(writer)},
        training={"max_steps": 1, "seq_len": 64},
        data=FEW,
    )
    assert run(config) == 0
    assert f"answers: 3 by {writer} to each of " in capsys.readouterr().err
    before = bytes_of(tmp_path / "cache")
    assert run(config, *elsewhere(tmp_path / "again")) == 0
    assert bytes_of(tmp_path / "cache") == before and any("answers-" in name for name in before)
    assert_same_run(tmp_path, tmp_path / "again")


def test_a_model_that_cannot_be_asked_is_named(make: Make, tmp_path: Path, capsys: Capture) -> None:
    config = make(verifier={"n_sampled": 1, "sampled_from": str(tmp_path / "gone.ckpt")})
    assert f"verifier.sampled_from: {tmp_path / 'gone.ckpt'}: not found" in refused(config, capsys)


# --- what it is not for ---------------------------------------------------------------------------


@pytest.mark.slow
def test_every_other_program_says_that_it_is_no_model(
    make: Make, writer: Path, tmp_path: Path, capsys: Capture
) -> None:
    """infer.py and training.init_from need a language model; a verifier is listed with its stage,
    and --verifier refuses a language model.
    """
    config = make(training={"max_steps": 1})
    assert run(config) == 0
    final = tmp_path / "checkpoints" / "final.ckpt"
    capsys.readouterr()
    assert infer.main(["--ckpt", str(final), "--prompt", "1 + 1 ="]) == 2
    problem = (
        f"{final}: is a verifier, which scores answers and cannot generate text. Give a language "
        f"model; --verifier takes a verifier."
    )
    assert f"error: {problem}" in capsys.readouterr().err
    assert f"training.init_from: {problem}" in refused(
        make(training={"init_from": str(final), "checkpoint_dir": str(tmp_path / "b")}), capsys
    )
    assert list_program.main(["--dir", str(final.parent)]) == 0
    assert re.search(r"step-000001.ckpt \(best, final, last\) +verifier ", capsys.readouterr().out)
    with pytest.raises(
        UserError,
        match=r"must be a verifier, got a language model \(stage pretrain\). Train a verifier: python finetune.py",
    ):
        checkpoint_load.load_verifier(writer)


def test_a_hugging_face_model_is_refused(make: Make, tmp_path: Path, capsys: Capture) -> None:
    from tests.training.test_finetune import save_llama

    save_llama(tmp_path / "llama")
    config = make(model=None, training={"init_from": f"hf:{tmp_path / 'llama'}"})
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    config.write_text(
        yaml.safe_dump({name: values for name, values in settings.items() if values is not None}),
        encoding="utf-8",
    )
    assert (
        "a verifier shares the blocks of our own decoder and cannot start from a Hugging Face "
        "model. Remove training.init_from" in refused(config, capsys)
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "verifier.n_wrong=0",
            "verifier.n_wrong: n_wrong and n_sampled are 0, so there are no wrong answers to learn "
            "from. Set n_wrong, or n_sampled and sampled_from.",
        ),
        (
            "verifier.n_sampled=2",
            "verifier.sampled_from: required if n_sampled is above 0. Set it to the checkpoint of "
            "the model that writes the answers.",
        ),
        (
            "verifier.sampled_from=x",
            "verifier.n_sampled: must be at least 1 if sampled_from is set, got 0.",
        ),
        (
            "verifier.kind=decoder",
            "verifier.kind: a verifier of kind decoder begins with the "
            "predictions of a trained model. Set training.init_from, or verifier.kind to encoder.",
        ),
        (
            "lora.r=4",
            "lora: cannot be combined with verifier. Remove lora or verifier.",
        ),
        (
            "dpo.beta=1",
            "dpo: cannot be combined with verifier. Remove dpo or verifier.",
        ),
        (
            "data.packing=padded",
            "data.packing: cannot be combined with verifier. Remove data.packing or verifier.",
        ),
        (
            "training.sample_prompt=x",
            "training.sample_prompt: cannot be combined with verifier. Remove training.sample_prompt or verifier.",
        ),
        (
            "model.position=alibi",
            "model.position: alibi is not supported with a verifier. Set model.position to rope, learned or none.",
        ),
    ],
)
def test_settings_that_a_verifier_has_no_use_for_are_refused(
    override: str, message: str, make: Make, capsys: Capture
) -> None:
    assert message in refused(make(), capsys, override)


def test_pretraining_refuses_a_verifier_section(make: Make, capsys: Capture) -> None:
    assert train.main(["--config", str(make())]) == 2
    assert (
        "verifier: only valid for finetune.py, which trains verifiers. Run finetune.py, or remove the verifier section."
        in capsys.readouterr().err
    )
