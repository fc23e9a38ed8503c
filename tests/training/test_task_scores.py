"""Tasks that are scored during training, the best checkpoint by any logged measure, and a run's length in
passes.
"""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import finetune
import train
from model import Progress
from tests.training.test_train import elsewhere
from tinylm.checkpoint import format as checkpoint_format
from tinylm.checkpoint.info import describe
from tinylm.checkpoint.load import load_model
from tinylm.eval.task_scores import evaluate_task
from tinylm.eval.tasks.data import load_task
from tinylm.eval.tasks.table import TASKS
from tinylm.generate.engine import Engine
from tinylm.rows.template_factory import make_template
from training.checkpoints import is_best

Make = Callable[..., Path]
TINY = {"n_layers": 1, "d_model": 16, "n_heads": 2, "max_seq_len": 192}


@pytest.fixture
def make(make_config: Make, tmp_path: Path) -> Make:
    """A config of a tiny run on the built-in rows of sst2, from new weights, with their scores."""

    def make(**training: Any) -> Path:
        settings = {"seq_len": 192, "train_on": "all", "max_steps": 6, "val_every_steps": 2}
        settings |= {"eval_tasks": {"sst2": "smoke"}, "eval_every_steps": 4}
        settings |= {"schedule": "constant"} | training
        data = {"task": "sst2", "dataset": "smoke", "template": "plain"}
        return make_config(model=TINY, data=data, training=settings)

    return make


def rows_of(folder: Path) -> dict[int, dict[str, str]]:
    """metrics.csv by step."""
    with open(next(folder.rglob("metrics.csv")), encoding="utf-8") as file:
        return {int(row["step"]): row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_scores_are_those_of_evaluation_and_choose_the_best_checkpoint(
    make: Make, tmp_path: Path, capsys: Any
) -> None:
    """Steps 4 and 6 (the last one) have scores, with the ends of their intervals; those of step 6 are
    what `evaluate_task` gives for final.ckpt. A run that is stopped at step 4 and resumed has the same
    rows and weights; best.ckpt is the last step with the highest accuracy.
    """
    config = make(best_by="sst2_accuracy")
    for folder, steps in (("parted", 4), ("parted", 6), ("whole", 6)):
        changed = [f"training.max_steps={steps}", *elsewhere(tmp_path / folder)]
        assert finetune.main(["--config", str(config), *changed]) == 0
    err = capsys.readouterr().err
    assert "task sst2, 12 rows: accuracy 0." in err and "best sst2_accuracy 0." in err
    parted, whole = rows_of(tmp_path / "parted"), rows_of(tmp_path / "whole")
    scored = {step for step, row in whole.items() if row["sst2_accuracy"]}
    assert scored == {4, 6}
    names = [name for name in whole[6] if name.startswith("sst2_")]
    assert names[:3] == ["sst2_accuracy", "sst2_accuracy_low", "sst2_accuracy_high"]
    assert all(parted[step][name] == whole[step][name] for step in scored for name in names)
    folder = tmp_path / "whole" / "checkpoints"
    final = load_model(folder / "final.ckpt")
    found = evaluate_task(
        Engine(final.model, final.tokenizer),
        TASKS["sst2"],
        load_task(TASKS["sst2"], None, smoke=True).examples,
        template=make_template("plain", final.tokenizer),
        seed=1337,
    )
    measure = found.measures["accuracy"]
    expected = [repr(measure.value), repr(measure.low), repr(measure.high)]
    assert [whole[6][name] for name in names[:3]] == expected
    best = max(scored, key=lambda step: (float(whole[step]["sst2_accuracy"]), step))
    assert describe(folder / "best.ckpt").step == best
    one, other = (
        checkpoint_format.read(tmp_path / name / "checkpoints" / "final.ckpt")["weights"]
        for name in ("parted", "whole")
    )
    assert all(torch.equal(one[name], weight) for name, weight in other.items())


@pytest.mark.slow
def test_validation_rows_of_the_run_can_be_scored(make: Make, tmp_path: Path) -> None:
    """Every fourth of the 12 built-in rows is held out: 3 rows."""
    config = make(eval_tasks={"sst2": "validation"}, eval_every_steps=None, max_steps=2)
    assert finetune.main(["--config", str(config)]) == 0
    accuracy = float(rows_of(tmp_path / "logs")[2]["sst2_accuracy"])
    assert accuracy * 3 == pytest.approx(round(accuracy * 3))


def test_the_best_is_the_highest_or_lowest_last_value() -> None:
    """A measure of which more is better is stored as its negative; of equal values the last counts."""
    progress = Progress(step=3, validations=[[1, 2.0], [2, 3.0], [3, 4.0]])
    assert not is_best(progress), "val_loss rises"
    progress.measured = {"sst2_accuracy": [[1, -0.5], [3, -0.5]]}
    assert is_best(progress)
    progress.measured = {"sst2_accuracy": [[1, -0.6], [3, -0.5]]}
    assert not is_best(progress)
    progress.measured = {"sst2_accuracy": [[1, -0.4]]}
    assert not is_best(progress), "not measured in this step"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"best_by": "val_acc"},
            "training.best_by: must be one of val_loss, val_ppl, val_bpb, val_accuracy, sst2_accuracy, "
            "sst2_accuracy_low, sst2_accuracy_high, sst2_macro_f1, sst2_macro_f1_low, "
            "sst2_macro_f1_high, got val_acc. Change it, or add a task to eval_tasks.",
        ),
        (
            {"eval_every_steps": 3},
            "training.eval_every_steps: must be a multiple of val_every_steps (2), got 3.",
        ),
        (
            {"eval_tasks": {"sst2": "none.jsonl"}},
            "training.eval_tasks.sst2: data.dataset: none.jsonl: not found",
        ),
        (
            {"best_by": "val_accuracy", "early_stopping_patience": 2},
            "training.best_by: cannot be combined with early_stopping_patience, which watches val_loss",
        ),
    ],
)
def test_what_cannot_be_scored_is_an_error_before_the_first_step(
    make: Make, capsys: Any, changes: dict[str, Any], message: str
) -> None:
    assert finetune.main(["--config", str(make(**changes))]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_length_of_a_run_in_passes(make_config: Make, tmp_path: Path, capsys: Any) -> None:
    """2 passes over R rows in steps of 64 are 2 R / 64 steps; the resumed run needs no other line."""
    rare = dict.fromkeys(("val_every_steps", "save_every_steps", "log_every_steps"), 1000)
    config = make_config(training={"max_epochs": 2, "micro_batch_size": 64, **rare})
    text = config.read_text(encoding="utf-8").replace("  max_steps: 6\n", "")
    config.write_text(text, encoding="utf-8")
    assert train.main(["--config", str(config), "model.d_model=8"]) == 0
    info = describe(tmp_path / "checkpoints" / "final.ckpt")
    assert info.passes == pytest.approx(2, abs=0.1)
    assert "training.duration 2 epochs: " in capsys.readouterr().err
    assert train.main(["--config", str(config), "model.d_model=8"]) == 0
    assert "already complete" in capsys.readouterr().err
    assert train.main(["--config", str(config), "training.max_steps=5", *elsewhere(tmp_path)]) == 2
    both = "training.duration: cannot be combined with max_steps (5)"
    assert both in capsys.readouterr().err
