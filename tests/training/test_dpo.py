"""Preference training end to end on tiny models: each kind of reference, numbers against
computations by hand and by trl, exact resume (FAULTS: A12, D1, D2, D9).
"""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import finetune
import infer
import list as list_program
import train
from tests import programs
from tests.objectives.test_preferences import alone
from tests.training.test_finetune import ROOT, Make, home, kill_twice, make, refused, run  # noqa: F401  (fixtures)
from tests.training.test_train import (
    Capture,
    Patch,
    assert_same_run,
    curve,
    elsewhere,
    interrupt_at,
)
from tinylm.checkpoint import format as checkpoint_format
from tinylm.checkpoint import initial as checkpoint_initial
from tinylm.checkpoint import load as checkpoint_load
from tinylm.config.loader import load_config
from tinylm.config.schema import DpoConfig
from tinylm.objectives.preferences import METRICS, Answers, answer_log_probs, preference_loss
from tinylm.tokenizer.hf_files import load_hf_tokenizer
from tinylm.tokens.packing import IGNORE_INDEX, RankShare
from training import run as training_run
from training import sampling
from training.stages import dpo
from training.stages.dpo import DPOModule, PreferenceData

LORA = {"lora": {"r": 4, "dropout": 0.2}}
# Every way to hold a policy to its reference, or to do without; each must hold for each.
RUNS: dict[str, dict[str, Any]] = {
    "copy": {"dpo": {"reference": "copy"}},
    "cached": {"dpo": {"reference": "cached"}},
    "lora copy": {"dpo": {"reference": "copy"}, **LORA},
    "lora off": {"dpo": {"reference": "adapters_off"}, **LORA},
    "lora cached": {"dpo": {"reference": "cached"}, **LORA},
    "hf_model lora off": {"dpo": {"reference": "adapters_off"}, "hf_model": True, **LORA},
    "hf_model copy": {"dpo": {"reference": "copy"}, "hf_model": True},
    "simpo": {"dpo": {"loss": "simpo", "beta": 2.0}},
    "lora orpo": {"dpo": {"loss": "orpo", "beta": 5.0}, **LORA},
    "hf_model simpo": {"dpo": {"loss": "simpo", "beta": 2.0}, "hf_model": True},
}
STILL = {"model": {"residual_dropout": 0.0, "attention_dropout": 0.0}}


@pytest.fixture
def prefer(make: Make, tmp_path: Path) -> Make:  # noqa: F811
    """Writes a config of a tiny run over 24 preferences, of which some are held out; the base has dropout 0.2."""
    words = ["one", "two", "red", "blue", "cat", "dog", "sun", "sea", "tea", "ink", "owl", "elm"]
    rows = [
        {"prompt": f"say {word}{mark}", "chosen": f"{word} {word}", "rejected": f"no, {word[0]}"}
        for mark in ("", "!")
        for word in words
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def write(**sections: Any) -> Path:
        data = {"dataset": str(path), "val_fraction": 0.4} | sections.pop("data", {})
        return make(data=data, **{"dpo": {}} | sections)

    return write


def pairs_of(config: Path) -> PreferenceData:
    """The data of a run."""
    settings = load_config(config)
    base = settings.training.init_from or ""
    tokenizer = (
        load_hf_tokenizer(base.removeprefix("hf:"))
        if base.startswith("hf:")
        else checkpoint_load.load_model(Path(base)).tokenizer
    )
    data = PreferenceData(settings, tokenizer)
    data.prepare()
    return data


# --- what a run does --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_learns_and_every_program_reads_what_it_wrote(
    name: str, prefer: Make, tmp_path: Path, capsys: Capture
) -> None:
    """The checkpoint has stage and template; the margin grows; sampling and listing work without the reference."""
    config = prefer(**RUNS[name], sampling={"max_new_tokens": 2})
    assert (
        run(config, "training.max_steps=12", "training.lr=3e-2", "training.sample_prompt=say red")
        == 0
    )
    output = capsys.readouterr()
    final = tmp_path / "checkpoints" / "final.ckpt"
    assert output.out == f"{final}\n"
    assert re.search(
        r": train \d+ pairs of answers of \d+ tokens, validation \d+ pairs; template instruction\n",
        output.err,
    )
    assert "Warning" not in output.err
    assert " 6 pairs per step, 12 steps" in output.err
    assert "val_margin" in output.err and "val_ppl" not in output.err
    assert output.err.count("sample: ⟦say red⟧") == 4
    margins = [float.fromhex(margin) for margin in curve(tmp_path, "val_margin").values()]
    assert margins[-1] > max(0.02, margins[0])
    assert float.fromhex(curve(tmp_path, "val_accuracy")[12]) > 0.5
    state = checkpoint_format.read(final)
    assert (state["stage"], state["config"]["data"]["template"]) == ("dpo", "instruction")
    assert not [weight for weight in state["weights"] if "reference" in weight]
    assert (
        infer.main(
            ["--ckpt", str(final), "--prompt", "say", "--max-new-tokens", "4", "--device", "cpu"]
        )
        == 0
    )
    assert list_program.main(["--dir", str(final.parent)]) == 0
    assert " dpo " in capsys.readouterr().out


def test_the_first_step_costs_ln_2_and_has_no_margin(prefer: Make, tmp_path: Path) -> None:
    """Without dropout the policy is its reference: h = 0, so -ln s(0) = 0.693147; both rewards are
    0. Then they part.
    """
    assert run(prefer(**STILL)) == 0
    assert float.fromhex(curve(tmp_path)[1]) == pytest.approx(0.693147, abs=1e-5)
    assert float.fromhex(curve(tmp_path, "margin")[1]) == pytest.approx(0, abs=1e-4)
    assert float.fromhex(curve(tmp_path)[6]) != float.fromhex(curve(tmp_path)[1])


@pytest.mark.slow
def test_metrics_have_a_column_for_each_measure(prefer: Make, home: Path, tmp_path: Path) -> None:  # noqa: F811
    """Of training rows at every row, of validation at validations; val_ppl and val_bpb would say
    nothing. Pretraining's file is as it was.
    """
    assert run(prefer()) == 0
    before = (
        "step,train_loss,val_loss,val_ppl,val_bpb,lr,grad_norm,tokens,tokens_per_s,passes,"
        "mfu,data_wait,peak_bytes"
    )
    assert (home / "logs" / "pretrain" / "metrics.csv").read_text(encoding="utf-8").splitlines()[
        0
    ] == before
    names = [*METRICS, *(f"val_{name}" for name in METRICS)]
    assert (tmp_path / "logs" / "tiny" / "metrics.csv").read_text(encoding="utf-8").splitlines()[
        0
    ] == ",".join([before, *names])
    for name in METRICS:
        assert sorted(curve(tmp_path, name)) == [1, 2, 3, 4, 5, 6]
        assert sorted(curve(tmp_path, f"val_{name}")) == [3, 6]
    assert curve(tmp_path, "val_ppl") == curve(tmp_path, "val_bpb") == {}


@pytest.mark.slow
def test_a_row_of_several_steps_is_the_mean_over_their_pairs(prefer: Make, tmp_path: Path) -> None:
    """The row of two steps of equally many pairs is the mean of theirs, for the loss and each measure."""
    config = prefer()
    for every in (1, 2):
        assert (
            run(config, *elsewhere(tmp_path / str(every)), f"training.log_every_steps={every}") == 0
        )
    for name in ("train_loss", *METRICS):
        single, double = (
            {step: float.fromhex(x) for step, x in curve(tmp_path / str(every), name).items()}
            for every in (1, 2)
        )
        # step 3 is validated, and its row repeats the last means
        assert [double[step] for step in (2, 4, 6)] == pytest.approx(
            [(single[step - 1] + single[step]) / 2 for step in (2, 4, 6)], rel=1e-12
        )
        assert double.get(3) == double[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [
        {},
        {"loss": "ipo", "beta": 0.5},
        {"loss": "hinge"},
        {"label_smoothing": 0.1},
        {"length_normalized": True, "beta": 2.0},
        {"loss": "simpo", "beta": 2.0, "gamma": 0.3},
        {"loss": "orpo", "beta": 0.5},
    ],
)
def test_validation_is_what_each_answer_alone_makes_of_it(
    loss: dict, prefer: Make, home: Path, tmp_path: Path
) -> None:  # noqa: F811
    """The oracle takes log-probabilities from both checkpoints, each answer by itself, and writes
    the losses out as the papers have them.
    """
    config = prefer(dpo=loss, training={"micro_batch_size": 4})
    assert run(config, "training.lr=3e-2") == 0
    data, dpo = pairs_of(config), DpoConfig(**loss)
    assert len(data.val_pairs) % 4, "the last batch has padding"
    policy, reference = (
        checkpoint_load.load_model(path).model
        for path in (tmp_path / "checkpoints" / "final.ckpt", home / "base" / "final.ckpt")
    )
    rows = []
    for pair in data.val_pairs:
        c, r, ref_c, ref_r = (
            alone(model, answer) for model in (policy, reference) for answer in pair[:2]
        )
        per_token = loss.get("loss") in ("ipo", "simpo", "orpo") or loss.get("length_normalized")
        n_c, n_r = (int(answer.trained.sum()) if per_token else 1 for answer in pair[:2])
        h = torch.tensor((c - ref_c) / n_c - (r - ref_r) / n_r, dtype=torch.float64)
        e = dpo.label_smoothing
        if dpo.reference is None:
            h = torch.tensor(c / n_c - r / n_r, dtype=torch.float64)
        odds = [math.exp(x) / (1 - math.exp(x)) for x in (c / n_c, r / n_r)]
        costs = {
            "simpo": -F.logsigmoid(dpo.beta * h - (dpo.gamma or 0)),
            "orpo": torch.tensor(-c / n_c - dpo.beta * math.log(odds[0] / sum(odds))),
            "sigmoid": -(1 - e) * F.logsigmoid(dpo.beta * h) - e * F.logsigmoid(-dpo.beta * h),
            "ipo": (h - 1 / (2 * dpo.beta)) ** 2,
            "hinge": F.relu(1 - dpo.beta * h),
        }
        rewards = dpo.beta * (c - ref_c), dpo.beta * (r - ref_r)
        if dpo.reference is None:
            rewards = dpo.beta * c / n_c, dpo.beta * r / n_r
        rows.append(
            [
                costs[dpo.loss].item(),
                *rewards,
                rewards[0] - rewards[1],
                float(rewards[0] > rewards[1]),
                c,
                r,
            ]
        )
    expected = np.mean(rows, axis=0).tolist()
    found = [
        float.fromhex(curve(tmp_path, name)[6])
        for name in ("val_loss", *(f"val_{name}" for name in METRICS))
    ]
    assert found == pytest.approx(expected, abs=2e-4)


@pytest.mark.slow
def test_the_loss_does_not_depend_on_how_a_step_is_divided(prefer: Make, tmp_path: Path) -> None:
    """6 pairs as 1 x 6, 2 x 3 and 3 x 2, whose answers have unequal lengths: the gradient is that
    of the mean over pairs, not over tokens.
    """
    curves = []
    for size, parts in ((6, 1), (2, 3), (3, 2)):
        folder = tmp_path / f"{size}x{parts}"
        config = prefer(
            **STILL,
            dpo={"sft_coef": 0.5},
            training={"micro_batch_size": size, "grad_accum_steps": parts},
        )
        assert run(config, *elsewhere(folder)) == 0
        curves.append(
            [
                [float.fromhex(x) for x in curve(folder, name).values()]
                for name in ("train_loss", "grad_norm", "margin", "val_loss")
            ]
        )
    for other in curves[1:]:
        for ours, theirs in zip(curves[0], other, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def stage_of(config: Path, monkeypatch: Patch) -> tuple[DPOModule, PreferenceData]:
    """What finetune.py would train, and on what."""
    made: list[Any] = []
    monkeypatch.setattr(
        training_run,
        "fit",
        lambda context, stage, module, data, *_: made.extend((module, data)) or 0,
    )
    assert run(config) == 0
    stage, data = made
    stage.configure_model()
    return stage, data


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["copy", "adapters_off", "cached"])
def test_the_gradient_is_that_of_the_mean_with_the_sft_term(
    reference: str, prefer: Make, monkeypatch: Patch
) -> None:
    """Against plain torch over all logits, pair by pair: mean of (-ln s(beta h) + c · cross entropy
    per token of the chosen answer).
    """
    config = prefer(
        **STILL, lora={"r": 4}, dpo={"reference": reference, "sft_coef": 0.3, "beta": 0.7}
    )
    stage, data = stage_of(config, monkeypatch)
    batch = data.train_dataset(RankShare(5))[0]
    torch.manual_seed(1)
    for name, weight in stage.decoder.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(weight, std=0.3)
    part = stage.batch_loss(batch, label_smoothing=0.0)
    ((part.loss + part.regularizer * part.n_targets) / part.n_targets).backward()
    found = {
        name: weight.grad.clone()
        for name, weight in stage.decoder.named_parameters()
        if weight.requires_grad
    }
    stage.decoder.zero_grad()
    base = checkpoint_load.load_model(Path(stage.config.training.init_from or "")).model
    total = torch.zeros(())
    for i in range(5):
        sums = {}
        for side in ("chosen", "rejected"):
            ids, labels = batch[f"{side}_ids"][i : i + 1], batch[f"{side}_labels"][i]
            for who, model in (("policy", stage.decoder), ("base", base)):
                log_p = F.log_softmax(model(ids)[0], dim=-1)[labels != IGNORE_INDEX]
                sums[side, who] = log_p.gather(1, labels[labels != IGNORE_INDEX][:, None]).sum()
        h = (
            sums["chosen", "policy"]
            - sums["chosen", "base"].detach()
            - sums["rejected", "policy"]
            + sums["rejected", "base"].detach()
        )
        length = (batch["chosen_labels"][i] != IGNORE_INDEX).sum()
        total = total - F.logsigmoid(0.7 * h) - 0.3 * sums["chosen", "policy"] / length
    (total / 5).backward()
    expected = {
        name: weight.grad
        for name, weight in stage.decoder.named_parameters()
        if weight.requires_grad
    }
    assert any(grad.abs().max() > 1e-3 for grad in expected.values())
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


# --- references -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_three_references_give_the_same_losses(prefer: Make, tmp_path: Path) -> None:
    """To 1e-6 over six steps, with dropout in the base's layers and in the adapters: the reference
    has none, the policy draws the same in each.
    """
    found = {}
    for reference in ("copy", "adapters_off", "cached"):
        assert (
            run(prefer(**LORA, dpo={"reference": reference}), *elsewhere(tmp_path / reference)) == 0
        )
        found[reference] = [
            [float.fromhex(x) for x in curve(tmp_path / reference, name).values()]
            for name in ("train_loss", "val_loss")
        ]
    for reference in ("adapters_off", "cached"):
        for ours, theirs in zip(found["copy"], found[reference], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-6)
    assert abs(found["copy"][0][0] - 0.693147) > 1e-4, (
        "dropout has made the policy another model than its reference"
    )


@pytest.mark.slow
def test_the_reference_has_no_dropout_whatever_the_trainer_asks(
    prefer: Make, monkeypatch: Patch
) -> None:
    """Training mode does not change it; none of its weights needs a gradient or is in the optimizer."""
    stage, _ = stage_of(prefer(), monkeypatch)
    stage.eval().train()
    assert stage.decoder.training
    assert stage.reference is not None
    assert not any(module.training for module in stage.reference.modules())
    assert not any(weight.requires_grad for weight in stage.reference.parameters())
    optimized = {
        id(weight)
        for group in stage.configure_optimizers().param_groups
        for weight in group["params"]
    }
    assert optimized == {id(weight) for weight in stage.decoder.parameters()}


def cached_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("reference-*.bin"))


@pytest.mark.slow
def test_cached_log_probabilities_are_computed_once_per_data_and_base(
    prefer: Make, home: Path, tmp_path: Path, monkeypatch: Patch
) -> None:  # noqa: F811
    """Another run of the same settings reads them; another template, context, base or row is
    another file. No model is kept beside the policy.
    """
    calls = []
    original = dpo.pair_log_probs
    monkeypatch.setattr(dpo, "pair_log_probs", lambda *given: calls.append(1) or original(*given))
    config = prefer(dpo={"reference": "cached"})
    for folder in ("a", "b"):
        assert run(config, *elsewhere(tmp_path / folder), "training.max_steps=1") == 0
    assert (len(calls), len(cached_files(tmp_path))) == (1, 1)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    others = [
        "data.template=plain",
        "training.seq_len=48",
        f"training.init_from={tmp_path / 'a' / 'checkpoints' / 'final.ckpt'}",
        "data.train_docs=9",
    ]
    for number, other in enumerate(others, start=2):
        assert run(config, *elsewhere(tmp_path / f"c{number}"), "training.max_steps=1", other) == 0
        assert (len(calls), len(cached_files(tmp_path))) == (number, number)
    stage, data = stage_of(config, monkeypatch)
    assert stage.reference is None
    assert all(pair.reference is not None for pair in [*data.train_pairs, *data.val_pairs])


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_a_loss_without_a_reference_holds_and_computes_none(
    loss: str, prefer: Make, home: Path, tmp_path: Path, monkeypatch: Patch
) -> None:  # noqa: F811
    """One model, one forward pass per batch, no cached file; the checkpoint refers to no model, and
    a resume reads none: the base may be gone.
    """
    base = shutil.copytree(home / "base", tmp_path / "base")
    config = prefer(dpo={"loss": loss}, training={"init_from": str(base / "final.ckpt")})
    module, data = stage_of(config, monkeypatch)
    passes: list[int] = []
    original = dpo.score_pairs
    monkeypatch.setattr(dpo, "score_pairs", lambda *given: passes.append(1) or original(*given))
    module.batch_loss(data.train_dataset(RankShare(5))[0], label_smoothing=0.0)
    assert (len(passes), module.reference, cached_files(tmp_path)) == (1, None, [])
    monkeypatch.undo()
    assert run(config, "training.max_steps=2") == 0
    assert checkpoint_format.read(tmp_path / "checkpoints" / "final.ckpt")["reference"] is None
    shutil.rmtree(base)
    assert run(config) == 0


@pytest.mark.slow
def test_a_resumed_run_keeps_its_reference(
    prefer: Make, tmp_path: Path, monkeypatch: Patch
) -> None:
    """NEG: were the reference taken from the resumed weights, h would begin at 0 again, and the
    curve would be another one.
    """
    config = prefer(**STILL)
    assert run(config, *elsewhere(tmp_path / "calm")) == 0
    step4 = tmp_path / "calm" / "checkpoints" / "step-000004.ckpt"
    assert run(config, "--resume", str(step4), *elsewhere(tmp_path / "right")) == 0
    assert curve(tmp_path / "right")[5] == curve(tmp_path / "calm")[5]
    monkeypatch.setattr(
        dpo, "build_initial", lambda config, initial: checkpoint_load.load_model(step4).model
    )
    monkeypatch.setattr(dpo, "require_same_model", lambda *given, **named: None)
    assert run(config, "--resume", str(step4), *elsewhere(tmp_path / "wrong")) == 0
    assert float.fromhex(curve(tmp_path / "wrong")[5]) == pytest.approx(0.693147, abs=1e-5)
    assert curve(tmp_path / "wrong")[5] != curve(tmp_path / "calm")[5]


# --- exact resume -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_goes_on_to_the_last_bit(
    name: str, prefer: Make, tmp_path: Path, monkeypatch: Patch
) -> None:
    """A12, C1: SIGTERM in the second of three micro-batches of step 4, dropout everywhere; resumed
    from step 4, equal to an uninterrupted run.
    """
    config = prefer(**RUNS[name])
    assert run(config, *elsewhere(tmp_path / "calm")) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3 * 3 + 2, lambda: os.kill(os.getpid(), signal.SIGTERM), DPOModule)
        assert run(config) == 143
    newest = checkpoint_format.latest_valid(tmp_path / "checkpoints")
    assert newest is not None and newest.name == "step-000004.ckpt"
    for file in cached_files(tmp_path):
        file.unlink()  # what it held comes from the base again
    assert run(config) == 0
    assert_same_run(tmp_path / "calm", tmp_path)
    for measure in (*METRICS, *(f"val_{measure}" for measure in METRICS)):
        assert curve(tmp_path / "calm", measure) == curve(tmp_path, measure)
    assert run(config) == 0, "complete"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["cached", *(pytest.param(name, marks=pytest.mark.long) for name in ("copy", "lora off"))],
)
def test_killed_again_and_again_the_curve_is_equal_to_the_last_bit(
    name: str, prefer: Make, tmp_path: Path
) -> None:
    """A12: SIGKILL once before the first step, for `cached` while the log-probabilities are
    computed, and twice later.
    """
    config = prefer(**RUNS[name], training={"max_steps": 14, "save_every_steps": 1})
    calm = [*elsewhere(tmp_path / "calm"), f"data.cache_dir={tmp_path / 'calm' / 'cache'}"]
    assert run(config, *calm) == 0
    command = [sys.executable, "finetune.py", "--config", str(config)]
    process = programs.Program(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert process.stderr is not None
    next(
        line
        for line in process.stderr
        if line.startswith("reference: " if name == "cached" else "data: ")
    )
    process.kill()
    process.communicate()
    assert cached_files(tmp_path) == []
    kill_twice(config, tmp_path / "logs" / "tiny" / "metrics.csv")
    assert_same_run(tmp_path / "calm", tmp_path)


@pytest.mark.slow
def test_two_processes_share_the_pairs(prefer: Make, tmp_path: Path) -> None:
    """Two ranks of 3 pairs are one device with 6, up to rounding; one rank computes the log-probabilities."""
    single, double = tmp_path / "single", tmp_path / "double"
    config = prefer(**STILL, dpo={"reference": "cached"}, training={"grad_accum_steps": 1})
    assert run(config, *elsewhere(single), "training.micro_batch_size=6") == 0
    for file in cached_files(tmp_path):
        file.unlink()
    command = [
        sys.executable,
        "finetune.py",
        "--config",
        str(config),
        *elsewhere(double),
        "training.micro_batch_size=3",
        "hardware.devices=2",
    ]
    done = programs.run(
        [*command, "hardware.strategy=ddp"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(cached_files(tmp_path)) == 1
    for name in ("train_loss", "grad_norm", "val_loss", "margin", "val_accuracy", "tokens"):
        ours, theirs = (
            [float.fromhex(x) for x in curve(folder, name).values()] for folder in (single, double)
        )
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5), name


# --- numbers that are not finite --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run(
    prefer: Make, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """D1: in the second step; exit code 3, the step and its rows are named, and what is saved is sound."""
    interrupt_at(monkeypatch, 3 + 2, lambda: float("nan"), DPOModule)
    assert run(prefer()) == 3
    assert (
        f"step 2: the loss is nan; rows at [['{tmp_path / 'pairs.jsonl'}:"
        in capsys.readouterr().err
    )
    assert checkpoint_format.candidates(tmp_path / "checkpoints") == []


@pytest.mark.slow
def test_a_step_that_is_skipped_leaves_its_columns_empty(
    prefer: Make, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """With training.skip_spikes the same second step of 4 is skipped, with the rewards of its pairs."""
    interrupt_at(monkeypatch, 3 + 2, lambda: float("nan"), DPOModule)
    assert run(prefer(), "training.skip_spikes=10") == 0
    assert "step 2: the loss is nan; rows at [['" in capsys.readouterr().err
    metrics = tmp_path / "logs" / "tiny" / "metrics.csv"
    rows = list(csv.DictReader(metrics.open(encoding="utf-8")))
    assert [row["skipped_steps"] for row in rows][:3] == ["0", "1", "1"]
    for name in ("train_loss", *DPOModule.train_columns):
        assert [row[name] == "" for row in rows][:3] == [False, True, False], name


@pytest.mark.slow
def test_an_infinite_gradient_stops_the_run(
    prefer: Make, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """D2: the loss is finite, one gradient is not."""
    original = DPOModule._step_totals

    def spoil(self: DPOModule) -> Any:
        next(self.decoder.parameters()).grad.view(-1)[0] = float("inf")
        return original(self)

    monkeypatch.setattr(DPOModule, "_step_totals", spoil)
    assert run(prefer()) == 3
    assert "step 1: the gradient norm is inf" in capsys.readouterr().err


# --- messages and errors -----------------------------------------------------------------------------------------


def test_skipped_pairs_are_logged(prefer: Make, tmp_path: Path, capsys: Capture) -> None:
    """D9, as a user sees it."""
    config = prefer()
    with open(tmp_path / "pairs.jsonl", "a", encoding="utf-8") as file:
        file.write('{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    assert run(config, "training.max_steps=1") == 0
    assert (
        f"skipped 1 row: the two answers are equal ({tmp_path / 'pairs.jsonl'}:25)"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_rows_of_both_splits_are_said(prefer: Make, tmp_path: Path, capsys: Capture) -> None:
    """E13."""
    assert (
        run(
            prefer(
                data={
                    "val_dataset": str(
                        shutil.copy(tmp_path / "pairs.jsonl", tmp_path / "val.jsonl")
                    )
                }
            ),
            "training.max_steps=1",
        )
        == 0
    )
    assert (
        "warning: 24 validation prompts with their chosen answers are also training rows"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"dpo": {"reference": "adapters_off"}},
            "dpo.reference: adapters_off needs a lora section. Set dpo.reference=copy or dpo.reference=cached, or add",
        ),
        (
            {"dpo": {"loss": "simpo", "reference": "copy"}},
            "dpo.reference: not valid for loss simpo, which has no reference model. Remove it.",
        ),
        (
            {"dpo": {"gamma": 1.0}},
            "dpo.gamma: only valid for loss simpo (loss is sigmoid). Remove it, or set dpo.loss=simpo.",
        ),
        (
            {"dpo": {"loss": "orpo", "sft_coef": 0.1}},
            "dpo.sft_coef: not valid for loss orpo, which contains the cross entropy of the chosen "
            "answers. Remove it.",
        ),
        (
            {"dpo": {"loss": "simpo", "length_normalized": True}},
            "dpo.length_normalized: not valid for loss simpo, which always normalizes by length.",
        ),
        (
            {"training": {"train_on": "all"}},
            "training.train_on: cannot be combined with dpo. Remove training.train_on or dpo.",
        ),
        (
            {"training": {"label_smoothing": 0.1}},
            "training.label_smoothing: cannot be combined with dpo",
        ),
        ({"data": {"rows": "alpaca"}}, "data.rows: cannot be combined with dpo"),
        ({"data": {"task": "sst2"}}, "data.task: cannot be combined with dpo"),
        (
            {"hardware": {"strategy": "fsdp"}},
            "dpo: not supported with hardware.strategy=fsdp, which does not shard the reference "
            "model. Set hardware.strategy=ddp.",
        ),
        (
            {"training": {"init_from": None}},
            "training.init_from: must be set: preferences are learned by a trained model.",
        ),
        (
            {"data": {"mix": [{"dataset": "a"}]}},
            "data.mix: only valid for pretraining and for fine-tuning on answers, not for preferences. Set data.dataset to one source.",
        ),
    ],
)
def test_an_impossible_setting_is_an_error_of_one_line(
    sections: dict, words: str, prefer: Make, tmp_path: Path, capsys: Capture
) -> None:
    """Exit code 2 and the setting's name, and nothing is written."""
    assert words in refused(prefer(**sections), tmp_path, capsys)


def test_a_folder_without_rows_is_not_replaced_by_other_rows(
    prefer: Make, tmp_path: Path, capsys: Capture
) -> None:
    """The built-in rows that replace a missing file elsewhere have no second answers."""
    (tmp_path / "empty").mkdir()
    message = refused(prefer(data={"dataset": str(tmp_path / "empty")}), tmp_path, capsys)
    assert (
        "has no file of rows. Give a file of preferences, such as data/tiny_preferences.jsonl."
        in message
    )


def test_pretraining_refuses_a_dpo_section(prefer: Make, capsys: Capture) -> None:
    """A section that a program would not look at is refused."""
    assert train.main(["--config", str(prefer())]) == 2
    assert (
        "error: dpo: only valid for finetune.py, which trains on preferences. Run finetune.py, or "
        "remove the dpo section." in capsys.readouterr().err
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["copy", "cached", "lora off"])
def test_a_run_resumes_only_with_its_own_reference(
    name: str, prefer: Make, home: Path, tmp_path: Path, capsys: Capture
) -> None:  # noqa: F811
    """Another model would fit by shape; the error names both fingerprints, and --allow-changes does not help."""
    config = prefer(**RUNS[name])
    assert run(config, "training.max_steps=2") == 0
    state = checkpoint_format.read(tmp_path / "checkpoints" / "final.ckpt")
    was = state["base" if "lora" in name else "reference"]
    assert state["reference"] is None or "lora" not in name
    assert checkpoint_initial.resolve_reference(
        was["path"], tmp_path / "checkpoints" / "final.ckpt"
    ) == str((home / "base" / "final.ckpt").resolve())
    other = home / "base" / "final.ckpt"
    changed = dict(checkpoint_format.read(other))
    changed["weights"] = {weight: tensor + 1e-3 for weight, tensor in changed["weights"].items()}
    checkpoint_format.write(tmp_path / "other.ckpt", changed)
    message = refused(
        config, tmp_path, capsys, f"training.init_from={tmp_path / 'other.ckpt'}", "--allow-changes"
    )
    assert f"the {'base' if 'lora' in name else 'reference'} model is " in message
    assert (
        f"with fingerprint {was['fingerprint']}, but training.init_from ({tmp_path / 'other.ckpt'}) has "
        in message
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "dpo.beta=0.2",
            "dpo.beta was 0.1 when it was saved, this run has 0.2. Set it back, choose another "
            "training.checkpoint_dir, or pass --allow-changes",
        ),
        ("dpo.reference=cached", "dpo.reference was copy when it was saved, this run has cached."),
        ("dpo=null", "a checkpoint of stage dpo, but this run is of stage sft."),
    ],
)
def test_another_run_is_not_resumed(
    override: str, words: str, prefer: Make, tmp_path: Path, capsys: Capture
) -> None:
    """A10, B14."""
    config = prefer()
    assert run(config, "training.max_steps=1") == 0
    assert words in refused(config, tmp_path, capsys, override)


@pytest.mark.slow
def test_a_sample_is_formatted_by_the_template(prefer: Make, monkeypatch: Patch) -> None:
    """As in fine-tuning; the bytes of the prompt are those that training has shown."""
    from tests.training.test_finetune import prompts_seen

    seen = prompts_seen(monkeypatch)
    assert (
        run(
            prefer(sampling={"max_new_tokens": 2}),
            "training.sample_prompt=say red",
            "training.max_steps=1",
        )
        == 0
    )
    assert {bytes(ids).decode() for ids in seen} == {"### Instruction: say red\n### Output:"}
    assert sampling.CHAT_STAGES == ("sft", "dpo", "grpo")


# --- trl --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {"loss_types": ["sigmoid"]}),
        ({"loss": "ipo"}, {"loss_types": ["ipo"]}),
        ({"loss": "hinge"}, {"loss_types": ["hinge"]}),
        ({"length_normalized": True}, {"loss_types": ["sigmoid_norm"]}),
        # trl has no cDPO of its own; its "aot" is it for a single pair, where sorting a batch of one does nothing
        ({"label_smoothing": 0.2}, {"loss_types": ["aot"], "label_smoothing": 0.2}),
    ],
)
def test_loss_and_gradient_by_the_logits_are_those_of_trl(ours: dict, theirs: dict) -> None:
    """trl's own DPOTrainer._compute_loss on the same logits in fp64, and the same rewards; a matrix
    of ones on the diagonal is our head.

    Smoothing is compared pair by pair, and so are the others.
    """
    pytest.importorskip("trl")
    from trl import DPOTrainer

    generator = torch.Generator().manual_seed(0)
    for pair in range(4):
        logits, reference = (
            torch.randn(2, 12, 7, generator=generator, dtype=torch.float64) * 2 for _ in range(2)
        )
        ids = torch.randint(7, (2, 12), generator=generator)
        mask = torch.zeros(2, 12, dtype=torch.long)
        mask[0, 3 : 5 + pair] = mask[1, 3 : 11 - pair] = 1
        leaf = logits.clone().requires_grad_()
        trainer = fake_trainer(DpoConfig(beta=0.4, **ours).beta, theirs, FakeModel(reference))
        loss = DPOTrainer._compute_loss(
            trainer,
            FakeModel(leaf),
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask},
            False,
        )
        (expected,) = torch.autograd.grad(loss, leaf)
        labels = torch.where(mask.bool(), ids, IGNORE_INDEX)[:, 1:]
        log_p = [
            Answers(
                *answer_log_probs(scores[:, :-1], torch.eye(7, dtype=torch.float64), labels).split(
                    1
                )
            )
            for scores in (leaf, reference)
        ]
        lengths = Answers(*(labels != IGNORE_INDEX).sum(dim=1).split(1))
        found = preference_loss(*log_p, lengths, DpoConfig(beta=0.4, **ours))
        (gradient,) = torch.autograd.grad(found.loss.mean(), leaf)
        torch.testing.assert_close(found.loss.mean(), loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
        assert expected.abs().max() > 1e-3 or ours.get("loss") == "hinge"
        logged = trainer._metrics["train"]
        assert found.chosen_reward.item() == pytest.approx(logged["rewards/chosen"][0], rel=1e-5)
        assert found.rejected_reward.item() == pytest.approx(
            logged["rewards/rejected"][0], rel=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_loss_and_gradient_without_a_reference_are_those_of_trl(
    loss: str, monkeypatch: Patch
) -> None:
    """The whole loss of trl's CPOTrainer (simpo) and ORPOTrainer from the same logits, pair by
    pair. trl's cross entropy in ORPO is over prompt and answer: the prompt is one token, which no
    token predicts.
    """
    pytest.importorskip("trl")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    kind = CPOTrainer if loss == "simpo" else ORPOTrainer
    generator = torch.Generator().manual_seed(0)
    for n_chosen, n_rejected in ((3, 11), (9, 4), (6, 6)):
        logits = (torch.randn(2, 12, 7, generator=generator) * 2).requires_grad_()
        ids = torch.randint(7, (2, 12), generator=generator)
        mask = torch.zeros(2, 12, dtype=torch.long)
        mask[0, 1 : 1 + n_chosen] = mask[1, 1 : 1 + n_rejected] = 1
        labels = torch.where(mask.bool(), ids, IGNORE_INDEX)
        mask[:, 0] = 1
        batch = {
            f"{side}_{name}": values[number : number + 1]
            for number, side in enumerate(("chosen", "rejected"))
            for name, values in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))
        }
        expected, _ = kind.get_batch_loss_metrics(
            reference_free_trainer(kind),
            lambda *given, scores=logits, **named: Namespace(logits=scores),
            batch,
        )
        (wanted,) = torch.autograd.grad(expected, logits)
        shifted = labels[:, 1:]
        log_p = answer_log_probs(logits[:, :-1], torch.eye(7), shifted)
        lengths = Answers(*(shifted != IGNORE_INDEX).sum(dim=1).split(1))
        settings = DpoConfig(loss=loss, beta=2.0, gamma=0.5 if loss == "simpo" else None)
        found = preference_loss(Answers(*log_p.split(1)), None, lengths, settings).loss.mean()
        (gradient,) = torch.autograd.grad(found, logits)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
        assert wanted.abs().max() > 1e-2


def reference_free_trainer(kind: Any) -> SimpleNamespace:
    """As much of a CPOTrainer or an ORPOTrainer as its loss looks at."""
    from functools import partial

    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda tensor: tensor),
        is_encoder_decoder=False, padding_value=0, pad_token_id=0, aux_loss_enabled=False, beta=2.0,
        loss_type="simpo", simpo_gamma=0.5, alpha=0.0, cpo_alpha=0.0, label_smoothing=0.0,
        concatenated_inputs=kind.concatenated_inputs, get_batch_logps=kind.get_batch_logps,
    )  # fmt: skip
    for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(kind, name):
            setattr(trainer, name, partial(getattr(kind, name), trainer))
    return trainer


class FakeModel:
    """What trl asks of a model, answered from given logits (2, T, V)."""

    training = True

    def __init__(self, logits: torch.Tensor):
        self.logits = logits

    def __call__(self, *, input_ids: torch.Tensor, labels: torch.Tensor, **rest: Any) -> Namespace:
        shifted = labels[:, 1:]
        log_p = (
            F.log_softmax(self.logits[:, :-1], dim=-1)
            .gather(2, shifted.clamp(min=0)[..., None])
            .squeeze(2)
        )
        log_p = log_p * (shifted != IGNORE_INDEX)
        nothing = torch.zeros_like(log_p)
        return Namespace(
            log_probs=log_p, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
        )


def fake_trainer(beta: float, settings: dict[str, Any], reference: FakeModel) -> SimpleNamespace:
    """As much of a DPOTrainer as its loss looks at."""
    from collections import defaultdict

    policy = torch.nn.Linear(1, 1)
    policy.is_gradient_checkpointing = False  # every model of transformers has it
    accelerator = SimpleNamespace(
        device="cpu", gather=lambda tensor: tensor, gather_for_metrics=lambda tensor: tensor
    )
    known = {
        "accelerator": accelerator, "model": policy, "ref_model": reference, "beta": beta, "loss_weights": [1.0], "label_smoothing": 0.0,
        "ld_alpha": None, "precompute_ref_logps": False, "f_divergence_type": "reverse_kl", "use_weighting": False, "aux_loss_enabled": False,
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None), "_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0, "_tp_size": 1,
    }  # fmt: skip
    return SimpleNamespace(**known | settings)


def test_both_answers_of_a_pair_are_shown(prefer: Make, tmp_path: Path, capsys: Capture) -> None:
    """The prompt is the same, and no target; the chosen answer says the word twice, the rejected
    one no and its first letter.
    """
    assert (
        finetune.main(["--config", str(prefer(data={"template": "plain"})), "--show-rows", "2"])
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 2 * 4
    for place in range(2):
        chosen, rejected = lines[8 * place : 8 * place + 4], lines[8 * place + 4 : 8 * place + 8]
        start = f"row {place}, micro-batch 0"
        assert chosen[0].startswith(f"{start}, chosen: {tmp_path / 'pairs.jsonl'}:")
        assert rejected[0] == chosen[0].replace("chosen", "rejected")
        found = re.match(r"┃0┃⟦say (\w+)!?⟧\\n(\w+) (\w+)<\|eos\|>", chosen[1])
        assert found and found[1] == found[2] == found[3]
        assert re.match(rf"┃0┃⟦say {found[1]}!?⟧\\nno, {found[1][0]}<\|eos\|>", rejected[1])
        assert rejected[2].endswith(" tokens, targets: 7, documents: 1")
