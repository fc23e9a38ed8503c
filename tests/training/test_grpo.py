"""Reinforcement learning end to end on tiny models: what a run writes, exact resume between and
inside the steps on a batch of answers, and what is refused.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import infer
import list as list_program
from tests.training.test_finetune import (  # noqa: F401  (fixtures)
    ROOT,
    Make,
    home,
    kill_in,
    make,
    refused,
    run,
)
from tests.training.test_train import (
    Capture,
    Patch,
    assert_same_run,
    curve,
    elsewhere,
    interrupt_at,
)
from tinylm.checkpoint import format as checkpoint_format
from tinylm.rewards.answer import Answer
from tinylm.rewards.rollouts import Rollout, batches_by_length
from tinylm.rows.prompts import PromptRow
from training.stages.grpo import GRPOModule, PromptShare

# Two prompts with 3 answers each. An untrained model writes random bytes, of which a bit less than
# half are characters before "o", so that most groups teach something.
FORM = {"reward": "format", "pattern": "[^o-\U0010ffff].*"}
GRPO = {"rewards": [FORM], "group_size": 3, "max_new_tokens": 3, "val_samples": 2, "slots": 4}
LORA = {"lora": {"r": 4}}
# What is trained: each must hold for each.
RUNS: dict[str, dict[str, Any]] = {
    "whole": {},
    "inner steps and a reference": {"grpo": {"inner_steps": 3, "kl": 0.1}},
    "lora": {"grpo": {"inner_steps": 2, "kl": 0.1}, **LORA},
    "hf_model": {"hf_model": True, "grpo": {"inner_steps": 2, "loss": "dapo"}},
    "hf_model lora": {"hf_model": True, "grpo": {"kl": 0.1, "loss": "dr_grpo"}, **LORA},
}


@pytest.fixture
def reward(make: Make) -> Make:  # noqa: F811
    """Writes a config of a tiny run on rewards; the base has dropout 0.2, which it must not use."""

    def write(**sections: Any) -> Path:
        return make(**sections | {"grpo": GRPO | sections.get("grpo", {})})

    return write


def rollouts(folder: Path) -> list[dict[str, Any]]:
    """The lines of rollouts.jsonl."""
    path = folder / "logs" / "tiny" / "rollouts.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def assert_same(
    a: Path, b: Path, names: tuple[str, ...] = ("reward", "val_reward", "entropy")
) -> None:
    """Two runs are equal to the last bit, answers included."""
    assert_same_run(a, b)
    for name in names:
        assert curve(a, name) == curve(b, name), name
    assert rollouts(a) == rollouts(b)


# --- what a run does ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_learns_and_every_program_reads_what_it_wrote(
    name: str, reward: Make, tmp_path: Path, capsys: Capture
) -> None:
    """The reward of held-out prompts grows; checkpoint, metrics, rollouts and samples are there."""
    config = reward(**RUNS[name])
    inner = RUNS[name].get("grpo", {}).get("inner_steps", 1)
    n = (24 if name == "whole" else 48) * inner
    steps = (f"training.max_steps={n}", "training.lr=3e-2", f"training.val_every_steps={n // 2}")
    assert run(config, *steps) == 0
    output = capsys.readouterr()
    final = tmp_path / "checkpoints" / "final.ckpt"
    assert output.out == f"{final}\n"
    assert "; template instruction; rewards format\n" in output.err
    assert f" 6 answers to 2 prompts per step, {n} steps" in output.err
    assert output.err.count("sample: ⟦say ") == 2
    rewards = [float.fromhex(value) for value in curve(tmp_path, "reward").values()]
    assert sum(rewards[-n // 4 :]) > sum(rewards[: n // 4])
    state = checkpoint_format.read(final)
    assert state["stage"] == "grpo"
    assert not [weight for weight in state["weights"] if "reference" in weight]
    if "lora" in RUNS[name]:
        assert all(".lora_A." in name or ".lora_B." in name for name in state["weights"])
    lines = rollouts(tmp_path)
    assert len(lines) == n // inner * 6
    assert [line["step"] for line in lines[::6]] == list(range(1, n + 1, inner))
    assert lines[0]["rewards"] == {"format": lines[0]["reward"]}
    assert infer.main(["--ckpt", str(final), "--prompt", "say", "--device", "cpu"]) == 0
    assert list_program.main(["--dir", str(final.parent)]) == 0
    assert " grpo " in capsys.readouterr().out


def test_metrics_are_means_over_the_answers_in_rollouts(reward: Make, tmp_path: Path) -> None:
    """metrics.csv against rollouts.jsonl: reward, length, truncated, groups without signal."""
    assert run(reward()) == 0
    lines = rollouts(tmp_path)
    for step in range(1, 7):
        own = [line for line in lines if line["step"] == step]
        values = [line["reward"] for line in own]
        mean = sum(values) / 6
        assert float.fromhex(curve(tmp_path, "reward")[step]) == pytest.approx(mean)
        tokens = sum(line["tokens"] for line in own) / 6
        assert float.fromhex(curve(tmp_path, "answer_tokens")[step]) == pytest.approx(tokens)
        cut = sum(line["truncated"] for line in own) / 6
        assert float.fromhex(curve(tmp_path, "truncated")[step]) == pytest.approx(cut)
        silent = sum(len(set(values[start : start + 3])) == 1 for start in (0, 3)) / 2
        assert float.fromhex(curve(tmp_path, "no_signal")[step]) == pytest.approx(silent)
    header = (tmp_path / "logs" / "tiny" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert ",kl" not in header[0], "without a reference there is no divergence from it"
    for name in ("val_pass_1", "val_pass_1_low", "val_pass_k", "val_pass_k_high", "val_reward"):
        assert sorted(curve(tmp_path, name)) == [3, 6]


@pytest.mark.slow
def test_the_policy_is_its_reference_at_the_first_step(reward: Make, tmp_path: Path) -> None:
    """With dropout off, the divergence from the reference is 0 and nothing is clipped; later the two
    part. A base with dropout 0.2 would differ from itself.
    """
    assert run(reward(grpo={"kl": 0.1, "inner_steps": 2})) == 0
    assert float.fromhex(curve(tmp_path, "kl")[1]) == 0
    assert float.fromhex(curve(tmp_path, "clipped")[1]) == 0
    assert float.fromhex(curve(tmp_path, "kl")[2]) > 0


@pytest.mark.slow
def test_a_truncated_answer_is_masked_or_costs(reward: Make, tmp_path: Path) -> None:
    """All answers of one token are cut: masked they train nothing, so that the weights
    stay; penalized each has half a point less.
    """
    frozen = ("training.weight_decay=0", "training.max_steps=1", "grpo.max_new_tokens=1")
    assert run(reward(grpo={"truncated": "mask"}), *elsewhere(tmp_path / "mask"), *frozen) == 0
    assert all(line["truncated"] for line in rollouts(tmp_path / "mask"))
    assert float.fromhex(curve(tmp_path / "mask", "grad_norm")[1]) == 0
    assert run(reward(), *elsewhere(tmp_path / "score"), *frozen) == 0
    assert float.fromhex(curve(tmp_path / "score", "grad_norm")[1]) > 0
    assert run(reward(grpo={"truncated": "penalize"}), *elsewhere(tmp_path / "cost"), *frozen) == 0
    plain, costly = rollouts(tmp_path / "score"), rollouts(tmp_path / "cost")
    assert [line["reward"] - 0.5 for line in plain] == [line["reward"] for line in costly]


@pytest.mark.slow
def test_answers_do_not_depend_on_how_many_are_sampled_at_once(
    reward: Make, tmp_path: Path
) -> None:
    """Up to rounding, which decides no token here, the text of an answer is a function of weights,
    prompt, seed and number; 4 slots or 5.
    """
    for slots in (4, 5):
        config = reward(grpo={"slots": slots}, training={"max_steps": 1})
        assert run(config, *elsewhere(tmp_path / str(slots))) == 0
    texts = [[line["answer"] for line in rollouts(tmp_path / str(slots))] for slots in (4, 5)]
    assert texts[0] == texts[1]


def test_answers_of_about_the_same_length_are_trained_together() -> None:
    """Each with its own values; a long answer among short ones would make their rows long too."""
    prompt = PromptRow(np.arange(5), "2+2=", "4", "rows.jsonl:1")
    answers = []
    for n in (20, 3, 30, 4):
        ids, answer = (n,) * n, Answer("2+2=", "", "4", "rows.jsonl:1", n, truncated=False)
        answers.append(Rollout(prompt, ids, (False,) * n, answer))
    rewards = {"reward": torch.tensor([2.0, 0.5, 3.0, 4.0])}
    kept = batches_by_length(answers, rewards, batch_size=2, pad_id=0, seq_len=64)
    assert [part["input_ids"].shape for part in kept] == [(2, 8), (2, 40)]
    assert [part["reward"].tolist() for part in kept] == [[0.5, 4.0], [2.0, 3.0]]
    firsts = [part["labels"][:, 4].tolist() for part in kept]  # the first token of each answer
    assert firsts == [[3, 4], [20, 30]]


def test_prompts_of_a_step_are_those_of_its_batch_of_answers() -> None:
    """Two micro-batches a step and two steps on the same answers: four micro-batches share them."""
    share = PromptShare(2, n_batches=4)
    assert [share.places(k)[0] for k in range(9)] == [0, 0, 0, 0, 2, 2, 2, 2, 4]


# --- resume ---------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a run at once."""


def kill() -> None:
    raise Killed


@pytest.mark.slow
@pytest.mark.parametrize("inner", [1, 3])
def test_a_run_that_ended_inside_a_step_resumes_to_the_last_bit(
    inner: int, reward: Make, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Saved every step, ended in the middle of step 5: with 3 steps on each batch of answers the
    checkpoint of step 4 contains the answers.
    """
    config = reward(grpo={"inner_steps": inner, "kl": 0.1}, training={"save_every_steps": 1})
    assert run(config, *elsewhere(tmp_path / "calm")) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4 * 3 + 2, kill, GRPOModule)
        with pytest.raises(Killed):
            run(config)
    state = checkpoint_format.read(tmp_path / "checkpoints" / "last.ckpt")
    assert state["step"] == 4 and ("rollouts" in state) == (inner == 3)
    assert run(config) == 0
    assert_same(tmp_path / "calm", tmp_path, ("reward", "val_reward", "kl", "clipped"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "inner steps and a reference",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("lora", "hf_model")),
    ],
)
def test_killed_again_and_again_a_run_is_equal_to_the_last_bit(
    name: str, reward: Make, tmp_path: Path
) -> None:
    """kill -9 in the first micro-batch, between two steps on the same answers, and inside them; some
    answers end early, so that others are generated without them.
    """
    sections = RUNS[name] | {"grpo": RUNS[name]["grpo"] | {"max_new_tokens": 20}}
    config = reward(**sections, training={"max_steps": 9, "save_every_steps": 1})
    assert run(config, *elsewhere(tmp_path / "calm")) == 0
    for micro_batch in (1, 5, 7, 4):
        kill_in(GRPOModule, micro_batch, config)
    assert run(config) == 0
    assert_same(tmp_path / "calm", tmp_path)
    assert len({line["tokens"] for line in rollouts(tmp_path)}) > 1


@pytest.mark.slow
def test_lines_of_steps_that_are_taken_again_are_not_written_twice(
    reward: Make, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Saved at step 2 only, ended in step 4; a partial line, as of a kill while it was written."""
    config = reward(training={"save_every_steps": 2, "val_every_steps": 6})
    assert run(config, *elsewhere(tmp_path / "calm")) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3 * 3 + 2, kill, GRPOModule)
        with pytest.raises(Killed):
            run(config)
    path = tmp_path / "logs" / "tiny" / "rollouts.jsonl"
    assert len(rollouts(tmp_path)) == 4 * 6
    with open(path, "ab") as file:
        file.write(b'{"step": 4, "row"')
    assert run(config) == 0
    assert path.read_bytes() == (tmp_path / "calm" / "logs/tiny/rollouts.jsonl").read_bytes()


# --- a function of the user's own -----------------------------------------------------------------

GOOD = "def score(prompts, answers, targets):\n    return [float(a[:1] < 'o') for a in answers]\n"
BAD = (
    GOOD.replace("    return", "    assert not counted(), 'stop'\n    return")
    + """
calls = []
def counted():
    calls.append(1)
    return len(calls) > 4
"""
)


@pytest.mark.slow
def test_a_reward_that_raises_ends_the_run_with_one_line_and_nothing_is_lost(
    reward: Make, tmp_path: Path, capsys: Capture
) -> None:
    """It raises at step 5; the last save was due at step 2, but step 4 is there, and with the
    corrected function the run equals one that never stopped. Another content is refused.
    """
    path = tmp_path / "mine.py"
    settings = {"save_every_steps": 2, "val_every_steps": 6}
    config = reward(
        grpo={"rewards": [{"reward": f"{path}:score"}]}, training=settings | {"max_steps": 6}
    )
    path.write_text(GOOD, encoding="utf-8")
    assert run(config, *elsewhere(tmp_path / "calm")) == 0
    path.write_text(BAD, encoding="utf-8")
    capsys.readouterr()
    assert run(config, "training.save_every_steps=3") == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "mine.py:score: raised AssertionError: stop (line 2) for the answer " in error
    assert "home0/rows.jsonl:" in error or "rows.jsonl" in error
    state = checkpoint_format.read(tmp_path / "checkpoints" / "last.ckpt")
    assert state["step"] == 4
    path.write_text(GOOD, encoding="utf-8")
    error = refused(config, tmp_path, capsys)
    assert "step-000004.ckpt: rewards was " in error and "--allow-changes" in error
    assert run(config, "--allow-changes") == 0
    assert_same(tmp_path / "calm", tmp_path, ("reward",))


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "arguments", "message"),
    [
        ({}, ["grpo.group_size=4"], "training.micro_batch_size: micro_batch_size x"),
        ({}, ["grpo.rewards=[{reward: nice}]"], "grpo.rewards: nice: no such reward. Use one of "),
        ({}, ["grpo.rewards=[{reward: regex}]"], "required for the rewards regex and format"),
        ({}, ["grpo.max_new_tokens=65"], "65 leaves no room for a prompt in training.seq_len (64)"),
        ({"training": {"init_from": None}}, [], "rewards are learned by a model"),
        ({"hardware": {"devices": 2}}, [], "samples its answers on one device"),
        ({}, ["--plan"], "--plan: not supported with a grpo section"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(
    sections: dict[str, Any],
    arguments: list[str],
    message: str,
    reward: Make,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    """Before the first step, naming the setting."""
    assert message in refused(reward(**sections), tmp_path, capsys, *arguments)
