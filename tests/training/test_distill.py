"""Fine-tuning with a teacher: what a step computes, exact resume, and which teachers are refused."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import infer
import train
from tests.training.test_finetune import Make, home, make, refused, run, save_llama  # noqa: F401
from tests.training.test_train import (
    Capture,
    Patch,
    assert_same_run,
    curve,
    elsewhere,
    interrupt_at,
)
from tinylm.checkpoint import format as checkpoint_format
from tinylm.config.loader import load_config
from tinylm.tokens.packing import IGNORE_INDEX, RankShare
from training import run as training_run
from training.stages import distill_cache
from training.stages.distill import DistillModule


@pytest.fixture
def distill(make: Make, home: Path) -> Make:  # noqa: F811
    """Writes a config of a tiny run whose teacher is the base that it starts from: dropout makes
    the student another model.
    """

    def write(**sections: Any) -> Path:
        settings = {
            "teacher": str(home / "base" / "final.ckpt"),
            "weight": 0.75,
            "temperature": 2.0,
        }
        return make(**{"distill": settings | sections.pop("distill", {})} | sections)

    return write


@pytest.mark.slow
def test_a_step_is_the_mixed_loss_and_the_teacher_has_no_dropout(
    distill: Make, monkeypatch: Patch
) -> None:
    """Against plain torch over all logits: 1/4 cross entropy + 3/4 · 2² · KL at temperature 2; the
    student moved away from its teacher, both without dropout. Only the student is trained.
    """
    made: list[Any] = []
    still = {"residual_dropout": 0.0, "attention_dropout": 0.0}
    with monkeypatch.context() as patch:
        patch.setattr(
            training_run,
            "fit",
            lambda context, stage, module, data, *_: made.extend((module, data)) or 0,
        )
        assert run(distill(model=still)) == 0
    module, data = made
    module.configure_model()
    module.train()
    assert module.decoder.training and not module.teacher.training
    assert not any(weight.requires_grad for weight in module.teacher.parameters())
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in module.decoder.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    batch = data.train_dataset(RankShare(2))[0]
    found = module.batch_loss(batch, label_smoothing=0.0)
    labels = batch["labels"].flatten()
    is_target = labels != IGNORE_INDEX
    student, teacher = (
        model(batch["input_ids"], document_ids=batch["document_ids"]).flatten(0, 1)[is_target]
        for model in (module.decoder, module.teacher)
    )
    log_p, log_q = F.log_softmax(student / 2, dim=-1), F.log_softmax(teacher / 2, dim=-1)
    kl = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    plain = F.cross_entropy(student, labels[is_target], reduction="sum")
    torch.testing.assert_close(found.loss, 0.25 * plain + 0.75 * 4 * kl, rtol=1e-5, atol=1e-4)
    assert kl > 0.1 and int(found.n_targets) == int(is_target.sum())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whole", "lora", "hf_model", "cached"])
def test_a_stopped_run_goes_on_to_the_last_bit(
    name: str, distill: Make, home: Path, tmp_path: Path, monkeypatch: Patch
) -> None:  # noqa: F811
    """SIGTERM in the second of three micro-batches of step 4, dropout in the student. The
    checkpoint has the student's weights alone and chats as any fine-tuned model.
    """
    sections: dict[str, Any] = {"lora": {"r": 4, "dropout": 0.2}} if name == "lora" else {}
    if name == "hf_model":
        sections = {"hf_model": True, "distill": {"teacher": f"hf:{home / 'llama'}"}}
    if name == "cached":
        sections = {"distill": {"cached": True, "top_k": 5}}
    config = distill(**sections)
    assert run(config, *elsewhere(tmp_path / "calm")) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3 * 3 + 2, lambda: os.kill(os.getpid(), signal.SIGTERM), DistillModule)
        assert run(config) == 143
    newest = checkpoint_format.latest_valid(tmp_path / "checkpoints")
    assert newest is not None and newest.name == "step-000004.ckpt"
    assert run(config) == 0
    assert_same_run(tmp_path / "calm", tmp_path)
    for measure in ("kl", "cross_entropy"):
        assert curve(tmp_path / "calm", measure) == curve(tmp_path, measure)
        assert sorted(curve(tmp_path, measure)) == [1, 2, 3, 4, 5, 6]
    final = tmp_path / "checkpoints" / "final.ckpt"
    state = checkpoint_format.read(final)
    assert state["stage"] == "sft"
    assert not [weight for weight in state["weights"] if "teacher" in weight]
    assert load_config(config).distill is not None
    command = ["--ckpt", str(final), "--prompt", "say", "--max-new-tokens", "2", "--device", "cpu"]
    assert infer.main(command) == 0


def caches(folder: Path) -> list[Path]:
    """The files of teachers' scores in a folder."""
    return sorted(folder.glob("teacher-*.bin"))


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_a_cached_teacher_gives_the_losses_of_one_that_reads_every_batch(
    packing: str, distill: Make, tmp_path: Path, monkeypatch: Patch
) -> None:
    """Up to rounding, which depends on the rows beside one another, over two passes. The second run,
    with a worker process, reads the file of the first: no model is called but the student.
    """
    steps = ("training.max_steps=6", f"data.packing={packing}")
    config = distill(distill={"top_k": 7})
    cache = (f"data.cache_dir={tmp_path / 'cache'}", "distill.cached=true")
    assert run(config, *steps, *elsewhere(tmp_path / "live")) == 0
    assert run(config, *steps, *cache, *elsewhere(tmp_path / "first")) == 0
    [file] = caches(tmp_path / "cache")
    monkeypatch.setattr(distill_cache, "_score_rows", None)
    worker = "data.num_workers=1"
    assert run(config, *steps, *cache, worker, *elsewhere(tmp_path / "second")) == 0
    assert_same_run(tmp_path / "first", tmp_path / "second")
    for name in ("kl", "train_loss"):
        live, cached = (curve(tmp_path / run, name) for run in ("live", "first"))
        assert list(live) == list(cached)
        for step, value in live.items():
            expected = pytest.approx(float.fromhex(value), rel=1e-5)
            assert float.fromhex(cached[step]) == expected
    assert caches(tmp_path / "cache") == [file]


@pytest.mark.slow
def test_another_teacher_or_setting_has_a_file_of_its_own(
    distill: Make, home: Path, tmp_path: Path, capsys: Capture
) -> None:  # noqa: F811
    """What changes a number of the file changes its name; a teacher with another tokenizer is
    refused before. The name of the first file is that of the last run.
    """
    config = distill(distill={"cached": True})
    folder = tmp_path / "cache"
    one_step = ("training.max_steps=1", f"data.cache_dir={folder}")
    state = dict(checkpoint_format.read(home / "base" / "final.ckpt"))
    state["weights"] = {name: weight + 1e-3 for name, weight in state["weights"].items()}
    other = tmp_path / "other.ckpt"
    checkpoint_format.write(other, state)
    for number, change in enumerate(
        ("distill.weight=0.5", f"distill.teacher={other}", "distill.top_k=3",
         "distill.temperature=1", "data.val_fraction=0.3", "distill.kl=reverse"), start=1
    ):  # fmt: skip
        assert run(config, *one_step, change, *elsewhere(tmp_path / str(number))) == 0
        assert len(caches(folder)) == min(number, 5), change
    teacher = f"distill.teacher=hf:{home / 'llama'}"
    message = refused(config, tmp_path, capsys, *one_step, teacher)
    assert "Teacher and student must read the same tokens." in message
    assert len(caches(folder)) == 5


def test_the_student_comes_near_its_teacher(distill: Make, home: Path, tmp_path: Path) -> None:  # noqa: F811
    """A new student of half the width learns only from the teacher (weight 1): the divergence on
    training rows falls.
    """
    model = {"n_layers": 1, "d_model": 8, "n_heads": 2, "max_seq_len": 160, "init": "trunc_normal"}
    training = {"init_from": None, "train_on": "all", "max_steps": 20, "lr": 3e-2}
    config = distill(model=model, training=training, distill={"weight": 1.0, "temperature": 1.0})
    assert run(config) == 0
    divergence = [float.fromhex(x) for x in curve(tmp_path, "kl").values()]
    assert divergence[-1] < 0.5 * divergence[0]
    assert curve(tmp_path) == curve(tmp_path, "kl"), "with weight 1 it is the whole loss"


@pytest.mark.slow
def test_another_teacher_is_refused_on_resume(
    distill: Make, home: Path, tmp_path: Path, capsys: Capture
) -> None:  # noqa: F811
    config = distill()
    assert run(config, "training.max_steps=2") == 0
    state = dict(checkpoint_format.read(home / "base" / "final.ckpt"))
    state["weights"] = {name: weight + 1e-3 for name, weight in state["weights"].items()}
    other = tmp_path / "other.ckpt"
    checkpoint_format.write(other, state)
    message = refused(config, tmp_path, capsys, f"distill.teacher={other}", "--allow-changes")
    assert "the teacher is " in message and "Set distill.teacher to that model." in message


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"distill": {"teacher": "none.ckpt"}}, "distill.teacher"),
        ({"dpo": {}}, "distill: cannot be combined with dpo"),
        (
            {"training": {"label_smoothing": 0.1}},
            "distill: cannot be combined with training.label_smoothing",
        ),
        (
            {"hardware": {"strategy": "fsdp"}},
            "distill: not supported with hardware.strategy=fsdp, which does not shard the teacher.",
        ),
    ],
)
def test_an_impossible_setting_is_an_error_of_one_line(
    sections: dict, words: str, distill: Make, tmp_path: Path, capsys: Capture
) -> None:
    message = refused(distill(**sections), tmp_path, capsys)
    assert words in message or "cannot be combined with distill" in message


def test_a_teacher_with_another_tokenizer_or_vocabulary_is_refused(
    distill: Make, home: Path, tmp_path: Path, capsys: Capture
) -> None:  # noqa: F811
    message = refused(distill(distill={"teacher": f"hf:{home / 'llama'}"}), tmp_path, capsys)
    assert "distill.teacher: has tokenizer " in message
    assert "Teacher and student must read the same tokens." in message
    model = {"n_layers": 1, "d_model": 8, "n_heads": 2, "max_seq_len": 160, "vocab_size": 320}
    training = {"init_from": None, "train_on": "all"}
    message = refused(distill(model=model, training=training), tmp_path, capsys)
    assert (
        "distill.teacher: its vocabulary has 260 rows, that of the model 320. Set model.vocab_size "
        "to the same number." in message
    )


def test_pretraining_refuses_the_section(distill: Make, capsys: Capture) -> None:
    assert train.main(["--config", str(distill())]) == 2
    assert "error: distill: only valid for finetune.py. Run finetune.py on rows" in (
        capsys.readouterr().err
    )
