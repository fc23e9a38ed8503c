"""Distillation on the student's own samples: what a step computes, exact resume, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.training.test_distill import distill  # noqa: F401  (fixture)
from tests.training.test_finetune import Make, home, kill_in, make, refused, run  # noqa: F401
from tests.training.test_train import (
    Capture,
    Patch,
    assert_same_run,
    curve,
    elsewhere,
    interrupt_at,
)
from tinylm.checkpoint import format as checkpoint_format
from tinylm.tokens.packing import IGNORE_INDEX, RankShare
from training import run as training_run
from training.stages.distill import DistillModule

OWN = {"own_samples": 0.5, "max_new_tokens": 5}
# What is trained: each must resume.
RUNS: dict[str, dict[str, Any]] = {
    "whole": {"distill": {"kl": "reverse"}},
    "lora": {"lora": {"r": 4, "dropout": 0.2}},
    "hf_model": {"hf_model": True},
}


@pytest.fixture
def own(distill: Make, home: Path) -> Make:  # noqa: F811
    """Writes a config of a tiny run with half of the micro-batches from the student, which has
    dropout.
    """

    def write(**sections: Any) -> Path:
        settings = OWN | sections.pop("distill", {})
        if sections.get("hf_model"):
            settings["teacher"] = f"hf:{home / 'llama'}"
        data = {"packing": "padded"} | sections.pop("data", {})
        return distill(distill=settings, data=data, **sections)

    return write


def rollouts(folder: Path) -> list[dict[str, Any]]:
    """The lines of rollouts.jsonl."""
    path = folder / "logs" / "tiny" / "rollouts.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_step_is_the_divergence_on_answers_of_the_student(own: Make, monkeypatch: Patch) -> None:
    """Against plain torch over all logits: 2² · KL(student, teacher) at temperature 2, on the tokens
    after the prompts of the rows, at most 5; the cross entropy, 1/4 of the loss on rows, is not in
    it. The student is in eval mode when it samples, and in training mode afterwards.
    """
    made: list[Any] = []
    still = {"residual_dropout": 0.0, "attention_dropout": 0.0}
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "fit", lambda *given: made.extend(given[2:4]) or 0)
        assert run(own(model=still, distill={"own_samples": 1.0, "kl": "reverse"})) == 0
    module, data = made
    module.configure_model()
    module.train()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in module.decoder.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    rows = data.train_dataset(RankShare(2))[0]
    batch = module.own.answers(module.decoder, rows, step=1, number=0)
    assert module.decoder.training
    labels = batch["labels"]  # (2, T)
    for i, row_labels in enumerate(rows["labels"]):
        n_prompt = int((row_labels != IGNORE_INDEX).int().argmax()) + 1
        assert torch.equal(batch["input_ids"][i, :n_prompt], rows["input_ids"][i, :n_prompt])
        is_target = labels[i] != IGNORE_INDEX
        assert is_target.nonzero()[0] == n_prompt - 1 and 1 <= is_target.sum() <= 5
        inner = is_target[:-1] & is_target[1:]
        assert torch.equal(labels[i, :-1][inner], batch["input_ids"][i, 1:][inner])
    is_target = labels.flatten() != IGNORE_INDEX
    student, teacher = (
        model(batch["input_ids"]).flatten(0, 1)[is_target]
        for model in (module.decoder, module.teacher)
    )
    log_p, log_q = F.log_softmax(student / 2, dim=-1), F.log_softmax(teacher / 2, dim=-1)
    kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    found = module.batch_loss(rows, label_smoothing=0.0)
    torch.testing.assert_close(found.loss, 4 * kl, rtol=1e-5, atol=1e-4)
    assert kl > 0.1 and int(found.n_targets) == int(is_target.sum())


@pytest.mark.slow
def test_answers_are_those_of_the_student_as_it_is_at_the_step(own: Make, tmp_path: Path) -> None:
    """Of the micro-batches 0, 1, 2, ... every second one is sampled, 2 rows each: one of the three
    of step 1, two of step 2. With a rate near 0 and with another one, the answers of step 1 are equal, since
    the weights are, and later ones are not. A cut answer fills its row: 65 bytes with its prompt.
    """
    training = {"max_steps": 2, "val_every_steps": 2}
    config = own(distill={"max_new_tokens": None}, training=training)
    assert run(config, *elsewhere(tmp_path / "still"), "training.lr=1e-12") == 0
    assert run(config) == 0
    still, moved = rollouts(tmp_path / "still"), rollouts(tmp_path)
    steps = [line["step"] for line in moved]
    assert steps == [1] * 2 + [2] * 4
    assert [line["row"] for line in still] == [line["row"] for line in moved]
    same = [a["answer"] == b["answer"] for a, b in zip(still, moved, strict=True)]
    assert all(same[:2]) and not all(same[2:])
    cut = [line for line in moved if line["truncated"]]
    assert cut and {len(line["prompt"]) + line["tokens"] for line in cut} == {65}
    assert all(set(line) & {"reward", "rewards"} == set() for line in moved)


class Killed(BaseException):
    """Ends a run at once."""


def kill() -> None:
    raise Killed


def assert_same(a: Path, b: Path) -> None:
    """Two runs are equal to the last bit, answers included."""
    assert_same_run(a, b)
    for name in ("kl", "cross_entropy"):
        assert curve(a, name) == curve(b, name)
    assert rollouts(a) == rollouts(b)


@pytest.mark.slow
def test_a_run_that_ended_inside_a_step_resumes_to_the_last_bit(
    own: Make, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Saved at step 2, ended in the first micro-batch of step 4, which is the student's."""
    config = own(training={"max_steps": 4, "val_every_steps": 4})
    assert run(config, *elsewhere(tmp_path / "calm")) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3 * 3 + 1, kill, DistillModule)
        with pytest.raises(Killed):
            run(config)
    state = checkpoint_format.read(tmp_path / "checkpoints" / "last.ckpt")
    assert state["step"] == 2 and "rollouts" not in state
    assert rollouts(tmp_path)[-1]["step"] == 4
    assert run(config) == 0
    assert_same(tmp_path / "calm", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kills"),
    [
        ("lora", (6,)),
        *(pytest.param(name, (2, 6, 3), marks=pytest.mark.long) for name in RUNS),
    ],
)
def test_killed_again_and_again_a_run_is_equal_to_the_last_bit(
    name: str, kills: tuple[int, ...], own: Make, tmp_path: Path
) -> None:
    """kill -9 in micro-batches of the student, the first one of the process and later ones, after the
    answers were written.
    """
    config = own(**RUNS[name], training={"max_steps": 4, "save_every_steps": 1})
    assert run(config, *elsewhere(tmp_path / "calm")) == 0
    for micro_batch in kills:
        kill_in(DistillModule, micro_batch, config)
    assert run(config) == 0
    assert_same(tmp_path / "calm", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["distill.cached=true"],
            "distill.cached: cannot be combined with own_samples, which are other texts in every "
            "step. Set cached=false, or own_samples=0.",
        ),
        (
            ["distill.own_samples=0"],
            "distill.max_new_tokens: only valid with own_samples, which is 0. Set own_samples, or "
            "remove it.",
        ),
        (
            ["data.packing=packed"],
            "data.packing: packed is not supported with distill.own_samples: new answers vary in "
            "length. Set padded.",
        ),
        (
            ["training.train_on=all"],
            "training.train_on: all is not supported with distill.own_samples: it samples answers. "
            "Set response.",
        ),
        (
            ["training.duration=20min", "training.max_steps=null"],
            "training.duration: a time is not supported with distill.own_samples: lengths vary. "
            "Give epochs.",
        ),
        (["--plan"], "--plan: not supported with distill.own_samples: most of a step is sampling"),
    ],
)
def test_what_makes_no_sense_together_is_refused_in_one_line(
    arguments: list[str], message: str, own: Make, tmp_path: Path, capsys: Capture
) -> None:
    """Before the first step, naming the setting."""
    assert message in refused(own(), tmp_path, capsys, *arguments)
