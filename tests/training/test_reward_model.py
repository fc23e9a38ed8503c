"""A reward model is trained on pairs, resumed to the last bit, scored alone and used to choose
answers; what it is not for is refused.
"""

import json
import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import eval_val
import finetune
import infer
import list as list_program
import train
from tests.training.test_dpo import prefer  # noqa: F401  (a fixture)
from tests.training.test_finetune import ROOT, Make, home, kill_twice, make, refused, run  # noqa: F401
from tests.training.test_train import (
    Capture,
    Patch,
    assert_same_run,
    curve,
    elsewhere,
    interrupt_at,
)
from tinylm.checkpoint import format as checkpoint_format
from tinylm.checkpoint.load import load_model, load_reward_model
from tinylm.config.loader import load_config
from tinylm.eval.reward_scoring import RewardScorer, load_scorer
from tinylm.rows.conversation import Turn
from tinylm.rows.preferences import build_pairs
from tinylm.rows.template_factory import make_template
from training.pipeline import check_kind
from training.stages.reward_model import RewardModule


@pytest.fixture
def reward(prefer: Make) -> Make:  # noqa: F811
    """Writes a config of a tiny run over 24 pairs; the base has dropout 0.2. It is that of a run of
    test_dpo, with the section of a reward model in place of that of preferences.
    """

    def write(**sections: Any) -> Path:
        path = prefer(**{"reward_model": {"center_coef": 0.01}} | sections)
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        del settings["dpo"]
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return path

    return write


def reward_alone(model: Any, ids: torch.Tensor) -> float:
    """The reward of a text by itself, without padding: its last hidden state times the head."""
    with torch.no_grad():
        hidden = model.features(ids[None]).hidden[0, -1]
        return float(hidden @ model.reward_head.weight[0])


@pytest.mark.slow
def test_a_run_starts_at_log_2_and_every_program_reads_or_refuses_its_model(
    reward: Make, tmp_path: Path, capsys: Capture
) -> None:
    """The head starts at 0, so all rewards are 0 and the loss is ln 2. Then the chosen answers win."""
    config = reward()
    assert run(config, "training.max_steps=12", "training.lr=3e-2") == 0
    printed = capsys.readouterr()
    final = tmp_path / "checkpoints" / "final.ckpt"
    assert " 6 pairs per step, 12 steps" in printed.err and "Warning" not in printed.err
    assert float.fromhex(curve(tmp_path)[1]) == pytest.approx(math.log(2), rel=1e-6)
    assert float.fromhex(curve(tmp_path, "val_accuracy")[12]) > 0.5
    low, high = (
        float.fromhex(curve(tmp_path, f"val_accuracy_{end}")[12]) for end in ("low", "high")
    )
    assert low < float.fromhex(curve(tmp_path, "val_accuracy")[12]) <= high
    state = checkpoint_format.read(final)
    assert state["stage"] == "reward_model"
    assert "head.weight" not in state["weights"]
    assert state["weights"]["reward_head.weight"].shape == (1, 16)
    assert list_program.main(["--dir", str(final.parent)]) == 0
    assert " reward_model " in capsys.readouterr().out
    assert infer.main(["--ckpt", str(final), "--prompt", "say"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {final}: is a reward model, which scores answers and cannot generate text. "
        "Give a language model; --verifier takes a reward model."
    )


@pytest.mark.slow
def test_it_is_scored_alone_as_in_training_and_by_hand(
    reward: Make, tmp_path: Path, capsys: Capture
) -> None:
    """eval_val.py gives the numbers of metrics.csv; the oracle scores every text by itself."""
    config = reward(training={"micro_batch_size": 4})
    assert run(config, "training.lr=3e-2") == 0
    final = tmp_path / "checkpoints" / "final.ckpt"
    capsys.readouterr()
    assert eval_val.main(["--ckpt", str(final), "--config", str(config), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    loaded, settings = load_reward_model(final), load_config(config)
    template = make_template(settings.data.template, loaded.tokenizer)
    seed, seq_len = settings.training.seed, settings.training.seq_len
    pairs, _ = build_pairs(settings.data, "val", seed, template, loaded.tokenizer, seq_len - 1)
    losses, right = [], 0
    for pair in pairs:
        chosen, rejected = (
            reward_alone(loaded.model, torch.from_numpy(example.ids)) for example in pair[:2]
        )
        losses.append(math.log(1 + math.exp(rejected - chosen)) + 0.01 * (chosen + rejected) ** 2)
        right += chosen > rejected
    assert found["pairs"] == len(pairs)
    assert found["val_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert found["val_accuracy"] == right / len(pairs)
    for name in ("val_loss", "val_accuracy", "val_margin", "val_accuracy_low"):
        assert found[name] == pytest.approx(float.fromhex(curve(tmp_path, name)[6]), rel=1e-5)
    others = tmp_path / "others.jsonl"
    others.write_text('{"prompt": "say one", "chosen": "one one", "rejected": "no"}\n', "utf-8")
    arguments = ["--ckpt", str(final), "--config", str(config), f"data.val_dataset={others}"]
    assert eval_val.main(arguments) == 0
    printed = capsys.readouterr()
    assert f"on 1 pairs ({final}, step 6)" in printed.out
    assert "note: not the validation data of the training run" in printed.err


@pytest.mark.slow
def test_it_chooses_among_the_answers_of_a_model(
    reward: Make, home: Path, tmp_path: Path, capsys: Capture
) -> None:  # noqa: F811
    """infer.py --best-of prints the answer with the highest reward; the JSON has all of them."""
    assert run(reward(), "training.lr=3e-2") == 0
    final = tmp_path / "checkpoints" / "final.ckpt"
    command = ["--ckpt", str(home / "base" / "final.ckpt"), "--prompt", "say one", "--best-of", "3"]
    command += ["--verifier", str(final), "--max-new-tokens", "5", "--device", "cpu", "--json"]
    capsys.readouterr()
    assert infer.main(command) == 0
    found = json.loads(capsys.readouterr().out)["completions"]
    texts = [completion["text"] for completion in found]
    rewards = [completion["reward"] for completion in found]
    scorer = load_scorer(final, "cpu")
    assert isinstance(scorer, RewardScorer)
    assert scorer.score_texts(["say one"] * 3, texts) == pytest.approx(rewards, abs=1e-6)
    assert rewards == sorted(rewards, reverse=True)


@pytest.mark.slow
def test_scores_do_not_depend_on_the_other_texts(reward: Make, tmp_path: Path) -> None:
    """A text among longer ones has the reward that it has alone; its end is kept if it is long."""
    assert run(reward(), "training.lr=3e-2", "training.max_steps=2") == 0
    loaded = load_reward_model(tmp_path / "checkpoints" / "final.ckpt")
    scorer = RewardScorer.of(loaded)
    prompts, answers = ["say one", "say two", "x" * 200], ["one", "two two two", "end"]
    expected = []
    for prompt, answer in zip(prompts, answers, strict=True):
        conversation = (Turn("user", prompt), Turn("assistant", answer))
        ids = scorer.template.encode(conversation, loaded.tokenizer).ids[-scorer.seq_len :]
        expected.append(reward_alone(loaded.model, torch.from_numpy(ids)))
    assert scorer.score_texts(prompts, answers) == pytest.approx(expected, abs=1e-5)
    assert scorer.score_texts([], []) == []


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_last_bit(
    reward: Make, home: Path, tmp_path: Path, monkeypatch: Patch
) -> None:  # noqa: F811
    """SIGTERM in the second of three micro-batches of step 4, dropout everywhere."""
    config = reward()
    assert run(config, *elsewhere(tmp_path / "calm")) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3 * 3 + 2, lambda: os.kill(os.getpid(), signal.SIGTERM), RewardModule)
        assert run(config) == 143
    newest = checkpoint_format.latest_valid(tmp_path / "checkpoints")
    assert newest is not None and newest.name == "step-000004.ckpt"
    assert run(config) == 0
    assert_same_run(tmp_path / "calm", tmp_path)
    for measure in (*RewardModule.train_columns, *RewardModule.val_columns):
        assert curve(tmp_path / "calm", measure) == curve(tmp_path, measure)
    assert run(config) == 0, "complete"


@pytest.mark.slow
def test_killed_again_and_again_the_curve_is_equal_to_the_last_bit(
    reward: Make, tmp_path: Path
) -> None:
    """SIGKILL twice, each after two more rows of metrics."""
    config = reward(training={"max_steps": 14, "save_every_steps": 1})
    assert run(config, *elsewhere(tmp_path / "calm")) == 0
    kill_twice(config, tmp_path / "logs" / "tiny" / "metrics.csv")
    assert_same_run(tmp_path / "calm", tmp_path)


@pytest.mark.slow
def test_the_loss_does_not_depend_on_how_a_step_is_divided(reward: Make, tmp_path: Path) -> None:
    """6 pairs as 1 x 6, 2 x 3 and 3 x 2: the gradient is that of the mean over pairs."""
    still = {"residual_dropout": 0.0, "attention_dropout": 0.0}
    curves = []
    for size, parts in ((6, 1), (2, 3), (3, 2)):
        folder = tmp_path / f"{size}x{parts}"
        sizes = {"micro_batch_size": size, "grad_accum_steps": parts}
        assert run(reward(model=still, training=sizes), *elsewhere(folder)) == 0
        names = ("train_loss", "grad_norm", "margin", "val_loss")
        curves.append([[float.fromhex(x) for x in curve(folder, n).values()] for n in names])
    for other in curves[1:]:
        for ours, theirs in zip(curves[0], other, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_the_rows_are_shown_with_the_token_whose_reward_counts(
    reward: Make, capsys: Capture
) -> None:
    """Each pair as two texts; the only label is the token that ends the answer."""
    assert finetune.main(["--config", str(reward()), "--show-rows", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("row 0, micro-batch 0, chosen: ")
    assert [line.split(", ")[1] for line in lines if "rewarded tokens" in line] == [
        "rewarded tokens: 1"
    ] * 2
    assert re.search(r"⟦### Instruction: say .*⟧", "".join(lines))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"training": {"init_from": None}},
            "training.init_from: must be set: preferences are learned by a trained model. Set it to "
            "a checkpoint of a decoder.",
        ),
        (
            {"hf_model": True},
            "training.init_from: a reward model has the blocks of our own decoder and cannot start "
            "from a Hugging Face model.",
        ),
        ({"lora": {"r": 4}}, "lora: cannot be combined with reward_model"),
        (
            {"training": {"sample_prompt": "say"}},
            "training.sample_prompt: cannot be combined with reward_model",
        ),
        (
            {"hardware": {"strategy": "fsdp"}},
            "reward_model: not supported with hardware.strategy=fsdp, which shards language models "
            "only. Set hardware.strategy=ddp.",
        ),
    ],
)
def test_an_impossible_setting_is_an_error_of_one_line(
    sections: dict, words: str, reward: Make, tmp_path: Path, capsys: Capture
) -> None:
    assert words in refused(reward(**sections), tmp_path, capsys)


@pytest.mark.slow
def test_other_programs_refuse_the_section_and_the_checkpoint(
    reward: Make, tmp_path: Path, capsys: Capture
) -> None:
    """train.py the section, a next stage the model as a start, align.py the wrong stage."""
    config = reward()
    assert train.main(["--config", str(config)]) == 2
    assert (
        "error: reward_model: only valid for finetune.py, which trains reward models. Run "
        "finetune.py, or remove the reward_model section." in capsys.readouterr().err
    )
    assert run(config, "training.max_steps=1") == 0
    final = tmp_path / "checkpoints" / "final.ckpt"
    assert run(config, *elsewhere(tmp_path / "next"), f"training.init_from={final}") == 2
    assert "is a reward model, which scores answers" in capsys.readouterr().err
    assert run(config, "reward_model=null") == 2
    assert "a checkpoint of stage reward_model, but this run is of stage sft" in (
        capsys.readouterr().err
    )
    with pytest.raises(Exception, match="has a reward_model section, but its stage is sft"):
        check_kind("sft", load_config(config), ("list.yaml",), ())
    with pytest.raises(Exception, match="is a reward model"):
        load_model(final)
