"""Training end to end on tiny models: output files, and exact resume (FAULTS: A, C1, C2, D1, D2, G1, G3)."""

import csv
import errno
import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import model
import train
from data import PretrainData
from tests import programs
from tests.conftest import write_token_file
from tinylm.checkpoint import format as checkpoint_format
from tinylm.checkpoint.load import load_model
from tinylm.common.errors import UserError
from tinylm.common.platform import STOP_SIGNALS
from tinylm.config.loader import load_config
from tinylm.config.model import RopeScalingConfig
from tinylm.tokenizer import bpe_fast
from tinylm.tokenizer.byte_char import ByteTokenizer
from training import checkpoints
from training.checkpoints import is_best
from training.context import RunContext
from training.stages import pretrain

ROOT = Path(__file__).resolve().parents[2]
HARD = {
    "model": {"residual_dropout": 0.2, "attention_dropout": 0.2},
    "training": {"grad_accum_steps": 3},
}
Make = Callable[..., Path]
Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]


def run(config: Path, *arguments: str) -> int:
    """The exit code of train.py in this process."""
    return train.main(["--config", str(config), *arguments])


def curve(folder: Path, name: str = "train_loss") -> dict[int, str]:
    """The exact bits of one column of metrics.csv, by step."""
    with open(folder / "logs" / "tiny" / "metrics.csv", newline="", encoding="utf-8") as file:
        return {
            int(row["step"]): float(row[name]).hex() for row in csv.DictReader(file) if row[name]
        }


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights at the end of a run."""
    return checkpoint_format.read(folder / "checkpoints" / "final.ckpt")["weights"]


def assert_same_run(a: Path, b: Path) -> None:
    """Every number that training and validation gave is equal to the last bit, and so are the weights."""
    for name in ("train_loss", "val_loss", "grad_norm", "lr", "tokens"):
        assert curve(a, name) == curve(b, name), name
    assert curve(a), "there must be something to compare"
    one, other = final_weights(a), final_weights(b)
    assert all(torch.equal(one[name], other[name]) for name in one)


def elsewhere(folder: Path) -> list[str]:
    """Overrides that put a run's files into another folder."""
    return [
        f"training.checkpoint_dir={folder / 'checkpoints'}",
        f"training.log_dir={folder / 'logs'}",
    ]


@pytest.fixture
def uninterrupted(make_config: Make, tmp_path: Path) -> Path:
    """The folder of a run of 6 steps that nothing disturbed."""
    folder = tmp_path / "calm"
    assert run(make_config(**HARD), *elsewhere(folder)) == 0
    return folder


# --- what a run writes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_writes_checkpoints_and_metrics_and_logs_the_next_command(
    make_config: Make, tmp_path: Path, capsys: Capture
) -> None:
    """Steps 2, 4, 6 are saved, step 2 is pruned (keep_last 2); the loss falls from ln 260 = 5.56 of a uniform guess."""
    assert run(make_config()) == 0
    folder = tmp_path / "checkpoints"
    assert {path.name for path in folder.glob("*.ckpt")} == {
        "step-000004.ckpt",
        "step-000006.ckpt",
        "last.ckpt",
        "best.ckpt",
        "final.ckpt",
    }
    losses = {step: float.fromhex(loss) for step, loss in curve(tmp_path).items()}
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    assert abs(losses[1] - math.log(260)) < 0.1
    assert losses[6] < losses[1]
    assert sorted(curve(tmp_path, "val_loss")) == [3, 6]
    output = capsys.readouterr()
    assert output.out == f"{folder / 'final.ckpt'}\n"
    assert output.err.startswith("device: cpu (requested)")
    assert f"next: python infer.py --ckpt {folder / 'final.ckpt'}" in output.err
    # 64 tokens a step; 6 N + 12 L H K T with N = 16*48 + 16*16 + 16*128 + 64*16 + 16*260 = 8256 weights that multiply
    assert "FLOPs per token, 64 tokens per step, 6 steps" in output.err
    assert "model: 8,304 parameters, 52.6k FLOPs" in output.err


@pytest.mark.slow
def test_perplexity_is_exp_of_the_token_weighted_mean(make_config: Make, tmp_path: Path) -> None:
    """STYLE's bug: not a mean of the perplexities of batches. bpb is nats / ln 2 / bytes; here a
    token is a byte or an EOS.
    """
    run(make_config())
    losses, ppl = curve(tmp_path, "val_loss"), curve(tmp_path, "val_ppl")
    assert all(
        math.isclose(float.fromhex(ppl[step]), math.exp(float.fromhex(losses[step])), rel_tol=1e-12)
        for step in losses
    )


@pytest.mark.slow
def test_the_loss_does_not_depend_on_how_a_step_is_divided(
    make_config: Make, tmp_path: Path
) -> None:
    """12 rows a step as 1 x 12, 3 x 4 and 4 x 3: the same mean over the same targets, so the same
    curve up to rounding.
    """
    curves = []
    for rows, parts in ((12, 1), (4, 3), (3, 4)):
        folder = tmp_path / f"{rows}x{parts}"
        assert (
            run(
                make_config(training={"micro_batch_size": rows, "grad_accum_steps": parts}),
                *elsewhere(folder),
            )
            == 0
        )
        curves.append(
            [
                [float.fromhex(x) for x in curve(folder, name).values()]
                for name in ("train_loss", "grad_norm", "val_loss")
            ]
        )
    for other in curves[1:]:
        for ours, theirs in zip(curves[0], other, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_plain", "sgd", "muon"])
def test_clipping_works_with_every_optimizer(
    make_config: Make, tmp_path: Path, optimizer: str, monkeypatch: Patch
) -> None:
    """STYLE's bug: fused AdamW switched clipping off. What reaches the step has a norm of at most grad_clip."""
    clipped, true_set_lr = [], model.set_lr
    monkeypatch.setattr(
        model,
        "set_lr",
        lambda optimizer, share: (
            clipped.append(_norm_of(optimizer)),
            true_set_lr(optimizer, share),
        )[1],
    )
    assert (
        run(make_config(training={"optimizer": optimizer, "grad_clip": 0.01, "max_steps": 2})) == 0
    )
    assert len(clipped) == 2
    assert all(norm <= 0.01 * (1 + 1e-4) for norm in clipped)
    assert all(float.fromhex(norm) > 0.01 for norm in curve(tmp_path, "grad_norm").values()), (
        "the norm that is logged is the one before clipping"
    )


def _norm_of(optimizer: torch.optim.Optimizer) -> float:
    grads = [
        p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    return float(torch.nn.utils.get_total_norm(grads))


@pytest.mark.slow
def test_early_stopping_ends_the_run_and_is_final(
    make_config: Make, tmp_path: Path, capsys: Capture
) -> None:
    """With a learning rate that does next to nothing validation soon fails to improve; a rerun has nothing to do."""
    config = make_config(
        training={"lr": 1e-30, "val_every_steps": 1, "early_stopping_patience": 2, "max_steps": 50}
    )
    assert run(config) == 0
    path = tmp_path / "checkpoints" / "final.ckpt"
    best = checkpoint_format.read(path)["step"]
    assert path.samefile(path.with_name("best.ckpt"))
    error = capsys.readouterr().err
    assert "best val_loss" in error
    assert (best < 3) == (f"at step {best} (best.ckpt)" in error)
    path.unlink()  # killed before it was linked
    assert run(config) == 0
    assert path.samefile(path.with_name("best.ckpt"))
    expected = (
        f'already complete at step 3: {path}\nnext: python infer.py --ckpt {path} --prompt ""\n'
    )
    assert capsys.readouterr().err.endswith(expected)


@pytest.mark.slow
def test_init_from_takes_the_weights_and_nothing_else(
    make_config: Make, uninterrupted: Path, tmp_path: Path
) -> None:
    """The new run begins at step 0 with the old run's weights: its first loss is far below that of a random model."""
    assert (
        run(
            make_config(
                training={
                    "init_from": str(uninterrupted / "checkpoints" / "final.ckpt"),
                    "max_steps": 1,
                    "val_every_steps": 1,
                }
            )
        )
        == 0
    )
    first = float.fromhex(curve(tmp_path)[1])
    assert first < float.fromhex(curve(uninterrupted)[1]) - 0.05


@pytest.mark.slow
def test_a_run_from_a_model_may_extend_its_context(
    make_config: Make, uninterrupted: Path, tmp_path: Path
) -> None:
    """To twice the positions, in rows of that length; the model that comes out has them."""
    scaling = {"type": "yarn", "factor": 2.0, "original_max_seq_len": 32}
    model = {"max_seq_len": 64, "rope_scaling": scaling}
    initial = str(uninterrupted / "checkpoints" / "final.ckpt")
    training = {"init_from": initial, "seq_len": 64, "max_steps": 1, "val_every_steps": 1}
    assert run(make_config(model=model, training=training)) == 0
    loaded = load_model(tmp_path / "checkpoints" / "final.ckpt")
    assert loaded.model.config.max_seq_len == 64
    assert loaded.model.config.rope_scaling == RopeScalingConfig(**scaling)
    with torch.no_grad():
        assert loaded.model(torch.arange(64)[None]).isfinite().all()


def test_init_from_needs_the_same_tokenizer(
    make_config: Make, uninterrupted: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Else each row of the embedding would mean another character; a missing file is reported with its setting."""
    model = f"training.init_from={uninterrupted / 'checkpoints' / 'final.ckpt'}"
    assert "final.ckpt was trained with tokenizer " in refused(
        make_config(), tmp_path, capsys, model, "tokenizer.kind=char", "model.vocab_size=260"
    )
    assert "error: training.init_from: nowhere.ckpt: not found" in refused(
        make_config(), tmp_path, capsys, "training.init_from=nowhere.ckpt"
    )


def test_a_prompt_that_cannot_be_encoded_is_found_before_training(
    make_config: Make, tmp_path: Path, capsys: Capture
) -> None:
    """The first validation would be too late."""
    message = refused(
        make_config(), tmp_path, capsys, "tokenizer.kind=char", "training.sample_prompt=€"
    )
    assert message.startswith("error: training.sample_prompt: position 0: the character '€'")


@pytest.mark.slow
def test_a_sample_is_shown_at_each_validation(make_config: Make, capsys: Capture) -> None:
    """Two validations, two samples that start with the prompt."""
    assert (
        run(make_config(training={"sample_prompt": "the model"}, sampling={"max_new_tokens": 5}))
        == 0
    )
    assert capsys.readouterr().err.count("sample: ⟦the model⟧") == 2


@pytest.mark.slow
def test_an_old_checkpoint_that_cannot_be_removed_is_one_line(
    make_config: Make, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    """B12: training continues."""
    unlink = Path.unlink

    def refuse(self: Path, missing_ok: bool = False) -> None:
        if self.name.startswith("step-"):
            raise OSError(errno.EIO, "Input/output error", str(self))
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    assert run(make_config(), "training.keep_last=1") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "cannot be removed" in line]
    folder = tmp_path / "checkpoints"
    assert lines == [
        f"{folder}/step-000002.ckpt cannot be removed: Input/output error",
        f"{folder}/step-000003.ckpt cannot be removed: Input/output error (2 old files are left)",
        f"{folder}/step-000004.ckpt cannot be removed: Input/output error (3 old files are left)",
    ]
    assert (folder / "step-000002.ckpt").exists()


# --- exact resume -----------------------------------------------------------------------------------------------------


def interrupt_at(
    monkeypatch: Patch,
    micro_batch: int,
    action: Callable[[], Any],
    stage: type[model.TrainingModule] = model.LanguageModule,
) -> None:
    """Call `action` after this process has computed the loss of that micro-batch (1, 2, ...)."""
    original, seen = stage.batch_loss, []

    def batch_loss(self: Any, batch: Any, *, label_smoothing: float) -> Any:
        result = original(self, batch, label_smoothing=label_smoothing)
        if self.training:
            seen.append(1)
            if len(seen) == micro_batch:
                changed = action()
                return result if changed is None else result._replace(loss=result.loss * changed)
        return result

    monkeypatch.setattr(stage, "batch_loss", batch_loss)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "times", "code"),
    [(number, 1, 128 + number) for number in STOP_SIGNALS] + [(signal.SIGINT, 10, 130)],
)
def test_a_signal_inside_an_accumulation_finishes_the_step_saves_and_resumes(
    make_config: Make,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: Patch,
    number: int,
    times: int,
    code: int,
) -> None:
    """C1, C2: the signal comes in the second of three micro-batches of step 3; validation of step 3
    is missing, and done after the resume.
    """
    config = make_config(**HARD)
    with monkeypatch.context() as patch:
        interrupt_at(
            patch, 3 * 2 + 2, lambda: [os.kill(os.getpid(), number) for _ in range(times)] and None
        )
        assert run(config) == code
    newest = checkpoint_format.latest_valid(tmp_path / "checkpoints")
    assert newest is not None and newest.name == "step-000003.ckpt"
    assert run(config) == 0
    assert_same_run(uninterrupted, tmp_path)


@pytest.mark.slow
def test_a_run_of_the_research_recipe_says_its_limit_first_and_resumes_exactly(
    make_config: Make, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """The signal comes in the second of three micro-batches of step 3, of 6."""
    config, calm = make_config(**HARD), tmp_path / "calm"
    assert run(config, "recipe=research", *elsewhere(calm)) == 0
    first = capsys.readouterr().err.splitlines()[0]
    own = "model.input_scalars and model.bigram_rows"
    assert first == f"cannot be exported to hf or gguf: a model with {own}"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3 * 2 + 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(config, "recipe=research") == 143
    assert run(config, "recipe=research") == 0
    assert_same_run(calm, tmp_path)


@pytest.mark.slow
def test_a_validation_that_no_later_process_would_make_up_for_is_finished(
    make_config: Make, uninterrupted: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    """C3: a signal in each validation. That of step 3 is interrupted once and then owed; that of step 6 is the last."""
    original = model.LanguageModule.validation_step

    def stop(self: Any, *given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *given)

    config = make_config(**HARD)
    with monkeypatch.context() as patch:
        patch.setattr(model.LanguageModule, "validation_step", stop)
        assert run(config) == 143
        assert sorted(curve(tmp_path, "val_loss")) == []
        assert run(config) == 143
        assert sorted(curve(tmp_path, "val_loss")) == [3] and max(curve(tmp_path)) == 3
        assert run(config) == 143
    assert run(config) == 0
    assert_same_run(uninterrupted, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_is_ignored_at_the_start_stays_ignored(
    make_config: Make, tmp_path: Path, monkeypatch: Patch, number: int
) -> None:
    """nohup ignores SIGHUP, a background shell SIGINT: the run does all 6 steps."""
    signal.signal(number, signal.SIG_IGN)
    interrupt_at(monkeypatch, 2, lambda: os.kill(os.getpid(), number))
    assert run(make_config()) == 0
    assert signal.getsignal(number) == signal.SIG_IGN
    assert checkpoint_format.read(tmp_path / "checkpoints" / "final.ckpt")["step"] == 6


@pytest.mark.slow
def test_resuming_twice_from_one_checkpoint_gives_the_same_and_leaves_it_alone(
    make_config: Make, uninterrupted: Path, tmp_path: Path
) -> None:
    """A3: from step 4 of the undisturbed run, twice; the second time as the newest that is sound
    in a folder.
    """
    source = uninterrupted / "checkpoints" / "step-000004.ckpt"
    before = source.read_bytes()
    part = tmp_path / "part"
    part.mkdir()
    shutil.copy(source, part)
    (part / "step-000005.ckpt").write_bytes(before[:-100])
    for name, start in (("first", source), ("second", part)):
        folder = tmp_path / name
        assert run(make_config(**HARD), "--resume", str(start), *elsewhere(folder)) == 0
        whole = curve(uninterrupted)
        assert curve(folder) == {step: whole[step] for step in (5, 6)}
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                final_weights(uninterrupted).values(), final_weights(folder).values(), strict=True
            )
        )
    assert source.read_bytes() == before


def test_a_folder_without_checkpoints_cannot_be_resumed(
    make_config: Make, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "empty").mkdir()
    assert run(make_config(**HARD), "--resume", str(tmp_path / "empty")) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: --resume: {tmp_path / 'empty'}: contains no checkpoint. "
        "Give a checkpoint, or a folder that has some."
    )


@pytest.mark.slow
def test_the_printed_config_is_the_same_run(
    make_config: Make, uninterrupted: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Every setting, those of the model that the run starts from included: it prints itself."""
    scratch, tuned, again = make_config(**HARD), tmp_path / "tuned.yaml", tmp_path / "again.yaml"
    base = uninterrupted / "checkpoints" / "final.ckpt"
    tuned.write_text(f"training: {{init_from: {base}, seq_len: 16}}", encoding="utf-8")
    for config in (scratch, tuned):
        capsys.readouterr()
        assert run(config, "training.lr=0.125", "--print-config") == 0
        printed = capsys.readouterr().out
        again.write_text(printed, encoding="utf-8")
        assert load_config(again).training.lr == 0.125
        assert load_config(again).model.d_model == 16
        assert run(again, "--print-config") == 0
        assert capsys.readouterr().out == printed
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_without_the_reseeding_of_dropout_a_resumed_run_differs(
    make_config: Make, uninterrupted: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    """NEG for A1: the comparison can fail."""
    torch.manual_seed(5)
    monkeypatch.setattr(torch, "default_generator", torch.Generator())
    assert (
        run(
            make_config(**HARD), "--resume", str(uninterrupted / "checkpoints" / "step-000004.ckpt")
        )
        == 0
    )
    assert curve(tmp_path)[5] != curve(uninterrupted)[5]


@pytest.mark.slow
def test_validation_and_samples_do_not_touch_training(
    make_config: Make, uninterrupted: Path, tmp_path: Path
) -> None:
    """A7: validating and sampling at every step instead of every third gives the same training losses."""
    settings = {
        "model": HARD["model"],
        "training": HARD["training"] | {"val_every_steps": 1, "sample_prompt": "a"},
        "sampling": {"max_new_tokens": 3},
    }
    assert run(make_config(**settings)) == 0
    assert curve(tmp_path) == curve(uninterrupted)
    assert sorted(curve(tmp_path, "val_loss")) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_another_number_of_threads_is_logged(
    make_config: Make, uninterrupted: Path, capsys: Capture
) -> None:
    """A8: one line that names both numbers."""
    resume = ["--resume", str(uninterrupted / "checkpoints" / "step-000004.ckpt")]
    assert run(make_config(**HARD), *resume, "hardware.threads=2") == 0
    assert (
        capsys.readouterr().err.count(
            "CPU threads were 1 and are now 2: results may differ in the last bits"
        )
        == 1
    )


@pytest.mark.slow
def test_max_steps_can_be_raised(make_config: Make, tmp_path: Path, capsys: Capture) -> None:
    """A9: the run continues to the new last step and logs that the schedule has changed."""
    assert run(make_config()) == 0
    assert run(make_config(), "training.max_steps=8") == 0
    assert (
        "training.max_steps was 6 and is now 8: the learning rate follows a schedule of 8 steps"
        in capsys.readouterr().err
    )
    assert sorted(curve(tmp_path)) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert checkpoint_format.read(tmp_path / "checkpoints" / "final.ckpt")["step"] == 8


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file under `folder` but the lock's owner."""
    return {
        str(path): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (".owner", ".lock")
    }


@pytest.mark.slow
def test_a_complete_run_is_not_continued(
    make_config: Make, tmp_path: Path, capsys: Capture
) -> None:
    """A11: exit code 0, and not a byte is written."""
    assert run(make_config()) == 0
    before = bytes_of(tmp_path)
    assert run(make_config()) == 0
    assert "already complete at step 6" in capsys.readouterr().err
    assert bytes_of(tmp_path) == before


def refused(config: Path, tmp_path: Path, capsys: Capture, *arguments: str) -> str:
    """The one line of a run that exits with 2 and changes no file."""
    before = bytes_of(tmp_path)
    capsys.readouterr()
    assert run(config, *arguments) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    after = bytes_of(tmp_path)
    assert {name: after.get(name) for name in before} == before
    return error[0]


@pytest.mark.slow
def test_changed_data_is_refused_unless_allowed(
    make_config: Make, corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    """A10: one byte of the text changed; the error names the checkpoint, the file, both fingerprints and the flag."""
    assert run(make_config(training={"max_steps": 4})) == 0
    was = checkpoint_format.read(tmp_path / "checkpoints" / "last.ckpt")["data"]
    corpus.write_bytes(corpus.read_bytes().replace(b"token", b"tokem", 1))
    config = make_config(training={"max_steps": 6})
    # one byte is in one document, which is either a training or a validation one
    message = refused(config, tmp_path, capsys)
    assert (
        f"step-000004.ckpt: {'train' if was['train'] in message else 'val'} data ({corpus}) was "
        in message
    )
    assert any(fingerprint in message for fingerprint in was.values())
    assert "--allow-changes" in message
    assert run(config, "--allow-changes") == 0


@pytest.mark.slow
def test_a_run_learns_its_own_tokenizer_and_goes_on_with_it(
    make_config: Make, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """The checkpoint has the merges: the run resumes exactly although the cache and the text to learn from are gone."""
    config = make_config(**HARD, tokenizer={"kind": "bpe", "vocab_size": 300})
    calm, broken = tmp_path / "calm", tmp_path / "broken"
    assert run(config, *elsewhere(calm)) == 0
    assert "vocabulary 300\n" in capsys.readouterr().err
    assert run(config, *elsewhere(broken)) == 0
    (broken / "checkpoints" / "final.ckpt").unlink()
    for name in ("step-000006.ckpt", "last.ckpt", "best.ckpt"):
        (broken / "checkpoints" / name).unlink()
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(bpe_fast, "count_words_of", None)
    assert run(config, *elsewhere(broken)) == 0
    assert_same_run(calm, broken)


@pytest.mark.slow
def test_shared_documents_are_counted_and_logged(
    make_config: Make, corpus: Path, tmp_path: Path, capsys: Capture
) -> None:
    """E13: the validation file is the first 20 lines of the training file."""
    val = tmp_path / "val.txt"
    val.write_text(
        "\n".join(corpus.read_text(encoding="utf-8").splitlines()[:20]), encoding="utf-8"
    )
    assert run(make_config(data={"val_dataset": str(val)})) == 0
    assert (
        "warning: 20 documents of data.val_dataset are also training documents"
        in capsys.readouterr().err
    )


def logged_about_data(config: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What train.py logs about the data of a run, without the first line."""
    caplog.clear()
    with caplog.at_level("INFO"):
        pretrain.open_data(RunContext("pretrain", load_config(config), "cpu"), ByteTokenizer())
    return [record.getMessage() for record in caplog.records][1:]


def test_documents_at_the_end_of_a_token_file_that_are_trained_on_are_counted(
    make_config: Make,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """E13: of 60 documents of ten tokens the last six validate; none, three or all of them are also further up."""
    for repeated in (0, 3, 6):
        documents = [f"{i:09}" for i in range(60 - repeated)]
        write_token_file(
            tmp_path / f"{repeated}.bin", [*documents, *documents[:repeated]], ByteTokenizer()
        )
    none, three, all_six = (
        make_config(f"{n}.yaml", data={"dataset": str(tmp_path / f"{n}.bin"), "val_fraction": 0.1})
        for n in (0, 3, 6)
    )
    assert logged_about_data(none, caplog) == []
    end = (
        "documents held out at the end (data.val_fraction=0.1) are also training documents; "
        "val_loss will look better than it is"
    )
    assert logged_about_data(three, caplog) == [f"warning: data.dataset: 3 of 6 {end}"]
    with pytest.raises(UserError) as caught:
        logged_about_data(all_six, caplog)
    found = (
        "all 6 documents held out at the end (data.val_fraction=0.1) are also training documents"
    )
    assert (
        str(caught.value)
        == f"data.dataset: {found}. Encode the file again without repeated documents, or set data.val_dataset."
    )
    both = {"dataset": str(tmp_path / "0.bin"), "val_dataset": str(tmp_path / "3.bin")}
    better = "are also training documents; val_loss will look better than it is"
    assert logged_about_data(make_config(data=both), caplog) == [
        f"warning: 57 documents of data.val_dataset {better}"
    ]
    mix = {
        "mix": [{"dataset": str(tmp_path / "0.bin")}, {"dataset": str(tmp_path / "3.bin")}],
        "val_fraction": 0.1,
    }
    # 54 to 59 validate the first source, 54 to 56 and 0 to 2 the second; both are trained on 0 to 53.
    assert logged_about_data(make_config(data=mix), caplog) == [f"warning: data.mix: 3 of 9 {end}"]


def test_a_run_warns_of_a_separator_that_does_not_separate(
    make_config: Make,
    write: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Both warnings, also from the cached files of an earlier run, and neither from a run that reads the file right."""
    path = write("a.txt", "".join(f"one {i} and some more words<|eos|>" for i in range(60)))
    lines, other = (
        write("b.txt", path.read_text(encoding="utf-8").replace("<|eos|>", "<|eos|>\n")),
        write("c.txt", "other words\n" * 9),
    )
    assert (
        logged_about_data(
            make_config(data={"dataset": str(path), "document_separator": "<|eos|>"}), caplog
        )
        == []
    )
    config = make_config(
        data={"dataset": str(lines), "document_separator": "##", "val_dataset": str(other)}
    )
    spelled = "1 of 1 documents contain <|eos|> in their text, where it is only characters and ends nothing"
    never = "data.document_separator '##' does not occur in it, so each .txt file is one document"
    for _ in range(2):
        assert logged_about_data(config, caplog) == [
            f"warning: {lines}: {spelled}. If it separates documents of a .txt file, set "
            f"data.document_separator to '<|eos|>'",
            f"warning: {lines}: {never}",
            f"warning: {other}: {never}",
        ]


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_changed_streamed_text_is_refused_too(
    make_config: Make, corpus: Path, tmp_path: Path, capsys: Capture, stream: bool
) -> None:
    """A10 for both ways of reading: a document is added at the end."""
    data = {"streaming": stream, "shuffle_window": 4, "val_docs": 5}
    assert run(make_config(data=data, training={"max_steps": 4})) == 0
    with open(corpus, "a", encoding="utf-8") as file:
        file.writelines(f"another document {i}\n" for i in range(20))
    assert "data (" in refused(make_config(data=data), tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "model.d_model=32",
            r"model.d_model was 16 when it was saved, this run has 32. Set it back, or choose "
            r"another training.checkpoint_dir.",
        ),
        (
            "tokenizer.kind=char",
            "tokenizer.kind was byte when it was saved, this run has char. Set it back, or choose",
        ),
        (
            "training.optimizer=muon",
            "training.optimizer was adamw when it was saved, this run has muon. Set it back, or choose",
        ),
        (
            "training.seed=1",
            "training.seed was 1337 when it was saved, this run has 1. Set it back, choose another "
            "training.checkpoint_dir, or pass --allow-changes",
        ),
        ("training.micro_batch_size=2", "training.micro_batch_size was 4"),
    ],
)
def test_another_run_is_not_resumed(
    make_config: Make, tmp_path: Path, capsys: Capture, override: str, words: str
) -> None:
    """A10: model, tokenizer and settings that decide what a step computes."""
    assert run(make_config(training={"max_steps": 4})) == 0
    message = refused(make_config(), tmp_path, capsys, override)
    assert "step-000004.ckpt: " in message and words in message


@pytest.mark.slow
def test_an_allowed_change_of_the_learning_rate_takes_effect(
    make_config: Make, tmp_path: Path
) -> None:
    """The optimizer's state comes from the checkpoint, its settings from the config: half the rate is half the rate."""
    assert run(make_config(training={"max_steps": 4, "schedule": "constant"})) == 0
    assert (
        run(
            make_config(training={"max_steps": 6, "schedule": "constant", "lr": 5e-3}),
            "--allow-changes",
        )
        == 0
    )
    rates = {step: float.fromhex(lr) for step, lr in curve(tmp_path, "lr").items()}
    assert rates == {1: 1e-2, 2: 1e-2, 3: 1e-2, 4: 1e-2, 5: 5e-3, 6: 5e-3}
    state = checkpoint_format.read(tmp_path / "checkpoints" / "final.ckpt")["optimizer"]
    assert {group["lr"] for group in state["param_groups"]} == {5e-3}


@pytest.mark.slow
def test_another_optimizer_is_refused_even_if_changes_are_allowed(
    make_config: Make, tmp_path: Path, capsys: Capture
) -> None:
    """The state of one optimizer is useless to another; an allowed change is logged."""
    assert run(make_config(training={"max_steps": 4})) == 0
    assert "training.optimizer was adamw" in refused(
        make_config(), tmp_path, capsys, "training.optimizer=sgd", "--allow-changes"
    )
    assert run(make_config(), "training.lr=0.001", "--allow-changes") == 0
    assert "allowed: training.lr was 0.01 and is now 0.001" in capsys.readouterr().err


@pytest.mark.slow
def test_a_finished_run_is_compared_before_it_is_called_complete(
    make_config: Make, tmp_path: Path, capsys: Capture
) -> None:
    """Another learning rate is another run, and not the one that is complete."""
    assert run(make_config()) == 0
    assert "training.lr was 0.01" in refused(make_config(), tmp_path, capsys, "training.lr=1")


@pytest.mark.slow
def test_a_branch_from_an_older_step_needs_its_own_folder(
    make_config: Make, uninterrupted: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Both branches stay: newer checkpoints of the old one are neither pruned nor mixed with the
    new one's, and its metrics are kept.
    """
    source = uninterrupted / "checkpoints" / "step-000004.ckpt"
    message = refused(
        make_config(**HARD), tmp_path, capsys, "--resume", str(source), *elsewhere(uninterrupted)
    )
    assert (
        "step-000006.ckpt: is newer than step 4, where --resume continues. Remove the newer "
        "checkpoints, or choose another training.checkpoint_dir" in message
    )
    old = (uninterrupted / "logs" / "tiny" / "metrics.csv").read_bytes()
    arguments = [
        "--resume",
        str(source),
        f"training.checkpoint_dir={tmp_path / 'branch'}",
        f"training.log_dir={uninterrupted / 'logs'}",
    ]
    assert run(make_config(**HARD), *arguments) == 0
    assert (uninterrupted / "logs" / "tiny" / "metrics.1.csv").read_bytes() == old
    assert sorted(curve(uninterrupted)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_no_step_stands_twice_in_the_metrics(
    make_config: Make, tmp_path: Path, monkeypatch: Patch
) -> None:
    """G4: a validation that is missing completes the row of its step; damaged and half-written rows are dropped."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(make_config()) == 143
    path = tmp_path / "logs" / "tiny" / "metrics.csv"
    assert sorted(curve(tmp_path, "val_loss")) == []
    with open(path, "ab") as file:
        file.write(b"3,\xff\0")
    assert run(make_config()) == 0
    with open(path, newline="", encoding="utf-8") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4", "5", "6"]
    assert sorted(curve(tmp_path, "val_loss")) == [3, 6]


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_skipped(
    make_config: Make, uninterrupted: Path, capsys: Capture
) -> None:
    """B1: one bit of step 6 is flipped; the run resumes from step 4 and ends with the same numbers."""
    whole = curve(uninterrupted)
    newest = uninterrupted / "checkpoints" / "step-000006.ckpt"
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    assert run(make_config(**HARD), *elsewhere(uninterrupted)) == 0
    error = capsys.readouterr().err
    assert "skipped: " in error and "step-000006.ckpt: damaged" in error and "at step 4" in error
    assert curve(uninterrupted) == whole


@pytest.mark.slow
def test_the_oldest_files_of_a_killed_run_are_removed_at_its_next_start(
    make_config: Make, tmp_path: Path, monkeypatch: Patch
) -> None:
    """K9: killed after the last save; another keep_last waits for the next save, as the run may yet be refused."""
    folder = tmp_path / "checkpoints"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "remove_oldest", lambda *given: None)
        assert run(make_config()) == 0
    assert len(list(folder.glob("step-*.ckpt"))) == 4, "steps 2, 3, 4 and 6"
    assert run(make_config(), "training.keep_last=1") == 0
    assert sorted(path.name for path in folder.glob("step-*.ckpt")) == [
        "step-000004.ckpt",
        "step-000006.ckpt",
    ]


@pytest.mark.slow
def test_a_new_run_refuses_a_used_folder(
    make_config: Make, tmp_path: Path, capsys: Capture
) -> None:
    """G3: --no-resume and auto_resume: false refuse a folder with checkpoints."""
    assert run(make_config()) == 0
    for argument in ("--no-resume", "training.auto_resume=false"):
        message = refused(make_config(), tmp_path, capsys, argument)
        assert (
            "already holds checkpoints (newest: step-000006.ckpt). Resume, or choose another training.checkpoint_dir."
            in message
        )


@pytest.mark.slow
def test_metrics_of_an_earlier_run_are_kept_under_another_name(
    make_config: Make, tmp_path: Path
) -> None:
    """G3: same run_name, other checkpoint folder."""
    assert run(make_config()) == 0
    before = (tmp_path / "logs" / "tiny" / "metrics.csv").read_bytes()
    assert run(make_config(), f"training.checkpoint_dir={tmp_path / 'other'}") == 0
    assert (tmp_path / "logs" / "tiny" / "metrics.1.csv").read_bytes() == before


def test_two_runs_in_one_folder(make_config: Make, tmp_path: Path, capsys: Capture) -> None:
    """G1: the second one exits with 2 and names the first."""
    with checkpoint_format.RunLock(tmp_path / "checkpoints"):
        assert f"process {os.getpid()} on" in refused(make_config(), tmp_path, capsys)


# --- numbers that are not finite --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_nan_loss_stops_before_the_step(
    make_config: Make, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """D1: exit 3 at step 5, named with its rows; the newest checkpoint is that of step 4, and its
    numbers are finite.
    """
    interrupt_at(monkeypatch, 5, lambda: math.nan)
    assert run(make_config()) == 3
    error = capsys.readouterr().err
    assert "error: step 5: the loss is nan; rows at [[" in error
    good = tmp_path / "checkpoints" / "step-000004.ckpt"
    assert f"The last good checkpoint is {good}: the same command continues from it; " in error
    newest = checkpoint_format.latest_valid(tmp_path / "checkpoints")
    assert newest is not None and newest.name == "step-000004.ckpt"
    state = checkpoint_format.read(newest)
    assert all(weight.isfinite().all() for weight in state["weights"].values())
    assert sorted(curve(tmp_path)) == [1, 2, 3, 4]


@pytest.mark.slow
def test_one_infinite_gradient_stops_before_the_step(
    make_config: Make, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """D2: the loss is finite, one element of one gradient is not; clipping by its norm would poison every weight."""
    original = model.TrainingModule._step_totals

    def poison(self: Any) -> Any:
        if self.progress.step == 2:
            self.decoder.embedding.weight.grad[0, 0] = math.inf
        return original(self)

    monkeypatch.setattr(model.TrainingModule, "_step_totals", poison)
    assert run(make_config()) == 3
    assert "error: step 3: the gradient norm is " in capsys.readouterr().err
    assert checkpoint_format.read(tmp_path / "checkpoints" / "last.ckpt")["step"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("val_batches", [1, 2])
def test_a_divergence_in_the_last_step_is_not_saved(
    make_config: Make, tmp_path: Path, capsys: Capture, val_batches: int
) -> None:
    """A rate of 1e38 in the only step: its loss and gradient are finite, the weights after it are useless."""
    overrides = ["max_steps=1", "lr=1e38", "schedule=constant", "warmup_ratio=0"]
    overrides.append(f"val_batches={val_batches}")
    assert run(make_config(), *[f"training.{override}" for override in overrides]) == 3
    error = capsys.readouterr().err
    assert (
        "error: step 1: val_loss is nan. The weights were not saved. Lower training.lr. " in error
    )
    assert error.endswith("No checkpoint was saved before\n")
    assert checkpoint_format.candidates(tmp_path / "checkpoints") == []


@pytest.mark.slow
def test_weights_that_are_not_finite_are_not_saved_before_any_validation(
    make_config: Make, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """Step 4 breaks one weight and is due for a save, without a validation; the run can continue from step 3."""
    original = model.TrainingModule.optimizer_step

    def step(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        if self.progress.step == 4:
            with torch.no_grad():
                self.decoder.embedding.weight[0, 0] = math.inf

    with monkeypatch.context() as patch:
        patch.setattr(model.TrainingModule, "optimizer_step", step)
        assert run(make_config()) == 3
    good = tmp_path / "checkpoints" / "step-000003.ckpt"
    error = capsys.readouterr().err
    assert (
        "step 4: the norm of the weights is inf. They were not saved. Lower training.lr. " in error
    )
    assert f"The last good checkpoint is {good}: " in error
    assert run(make_config()) == 0
    assert f"resuming {good} at step 3" in capsys.readouterr().err


@pytest.mark.slow
def test_a_validation_loss_of_nan_ends_the_run_before_it_is_saved(
    make_config: Make, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """The validation of step 3, of 6; metrics.csv has it until the run is resumed at step 2."""
    original = model.LanguageModule.val_metrics
    with monkeypatch.context() as patch:
        patch.setattr(
            model.LanguageModule,
            "val_metrics",
            lambda self, totals: original(self, totals) | {"val_loss": math.nan},
        )
        assert run(make_config()) == 3
    assert "error: step 3: val_loss is nan. The weights were not" in capsys.readouterr().err
    assert checkpoint_format.read(tmp_path / "checkpoints" / "last.ckpt")["step"] == 2
    assert run(make_config()) == 0
    assert sorted(curve(tmp_path, "val_loss")) == [3, 6]
    assert all(math.isfinite(float.fromhex(x)) for x in curve(tmp_path, "val_loss").values())


def test_a_nan_in_the_list_of_validations_does_not_stop_best_ckpt_from_being_written() -> None:
    """Older versions stored it: NaN, 3.0, 2.0 at steps 1 to 3; min() of that is NaN."""
    progress = model.Progress(step=3, validations=[[1, math.nan], [2, 3.0], [3, 2.0]])
    assert progress.best_val_loss == 2.0
    assert is_best(progress)
    assert not is_best(model.Progress(step=1, validations=[[1, math.nan]]))


@pytest.mark.slow
def test_a_broken_newest_checkpoint_is_skipped_and_does_not_push_out_good_ones(
    make_config: Make, tmp_path: Path, capsys: Capture
) -> None:
    """Step 6 of an older version has a weight that is NaN: the run continues from step 4, and keeps what it saves."""
    assert run(make_config()) == 0
    folder = tmp_path / "checkpoints"
    state = checkpoint_format.read(folder / "step-000006.ckpt")
    next(iter(state["weights"].values()))[0, 0] = math.nan
    for name in ("step-000006", "last", "best", "final"):
        (folder / f"{name}.ckpt").unlink()
    checkpoint_format.write(folder / "step-000006.ckpt", state)
    config = make_config(training={"keep_last": 1, "save_every_steps": 1})
    assert run(config, "training.max_steps=5") == 0
    error = capsys.readouterr().err
    problem = "has weights that are not finite numbers; its training diverged"
    assert f"skipped: {folder / 'step-000006.ckpt'}: {problem}" in error
    assert (folder / "step-000005.ckpt").exists()
    assert checkpoint_format.read(folder / "final.ckpt")["step"] == 5


# --- a run that ends too early ----------------------------------------------------------------------------------------


def end_batches_after(n: int, patch: Patch) -> None:
    """Give the loop only the first n micro-batches of a run."""
    original = PretrainData.train_dataloader

    def train_dataloader(self: PretrainData) -> DataLoader[Any]:
        return DataLoader(original(self).dataset, batch_size=None, sampler=range(n))

    patch.setattr(PretrainData, "train_dataloader", train_dataloader)


@pytest.mark.slow
def test_batches_that_end_before_the_last_step_are_an_error_after_a_save(
    make_config: Make, uninterrupted: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """After 9 micro-batches, which are 3 of 6 steps; the same command does the rest, equal to the last bit."""
    with monkeypatch.context() as patch:
        end_batches_after(9, patch)
        assert run(make_config(**HARD)) == 2
    good = tmp_path / "checkpoints" / "step-000003.ckpt"
    error = capsys.readouterr().err
    assert "error: training: the batches ended after step 3 of 6. The last good checkpoint" in error
    assert f"checkpoint is {good}: " in error
    assert not (tmp_path / "checkpoints" / "final.ckpt").exists()
    assert run(make_config(**HARD)) == 0
    assert_same_run(uninterrupted, tmp_path)


@pytest.mark.slow
def test_a_step_with_a_part_of_its_micro_batches_is_not_saved(
    make_config: Make, uninterrupted: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    """11 micro-batches: Lightning takes step 4 with 2 of 3, which no uninterrupted run would."""
    with monkeypatch.context() as patch:
        end_batches_after(11, patch)
        assert run(make_config(**HARD)) == 2
    assert "error: training: the batches ended after step 4 of 6. " in capsys.readouterr().err
    assert checkpoint_format.read(tmp_path / "checkpoints" / "last.ckpt")["step"] == 3
    assert run(make_config(**HARD)) == 0
    assert_same_run(uninterrupted, tmp_path)


# --- bad settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("hardware.accelerator=cuda", "hardware.accelerator: cuda is not available"),
        (
            "hardware.precision=16",
            "hardware.precision: 16 needs CUDA. Set hardware.precision to 32 or bf16.",
        ),
        (
            "model.vocab_size=100",
            "model.vocab_size: must be at least 260, the tokenizer's, got 100. Raise or remove it.",
        ),
        ("data.dataset=nowhere.txt", "nowhere.txt"),
        ("training.checkpoint_dir=/dev/null/x", "/dev/null/x"),
        ("training.log_dir=/dev/null/x", "/dev/null/x"),
    ],
)
def test_an_impossible_setting_is_an_error_of_one_line(
    make_config: Make, tmp_path: Path, capsys: Capture, override: str, words: str
) -> None:
    """F6, E8, B11: exit code 2 and the setting's name."""
    if override.endswith("cuda") and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert words in refused(make_config(), tmp_path, capsys, override)


# --- slow: real kills, real processes ---------------------------------------------------------------------------------


@pytest.fixture
def chaos() -> Iterator[ModuleType]:
    """benchmarks/chaos.py, the program that a user can run."""
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("chaos", ROOT / "benchmarks" / "chaos.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["chaos"] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["chaos"]
    sys.path[:] = path


@pytest.mark.slow
def test_broken_in_every_way_a_run_resumes_to_the_last_bit(
    chaos: ModuleType, capsys: Capture
) -> None:
    """A1, A2, B1-B7, C2, C3: one case of each kind; and two that end with another seed, which must be found."""
    assert chaos.main(["--rounds", "1"]) == 0, capsys.readouterr()
    table = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert table == [[kind, "1", "1", "1"] for kind in chaos.FAULTS]
    assert chaos.main(["--rounds", "1", "--kinds", "seam_kill", "damage", "--break-resume"]) == 1
    output = capsys.readouterr()
    assert [line.split()[1:] for line in output.out.splitlines()[1:]] == [["1", "1", "0"]] * 2
    for kind in ("seam_kill", "damage"):
        [line] = [line for line in output.err.splitlines() if line.startswith(f"{kind} 0: ")]
        assert ": metrics of step " in line, "the loss of the next step is another one"


def run_and_die(arguments: list[str], at: int) -> int:
    """The exit code of a child that trains and dies, as by kill -9, before its `at`-th sync,
    rename, link or removal of a checkpoint.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = 0

    def seam(true: Callable[..., Any]) -> Callable[..., Any]:
        def call(*paths: Any, **options: Any) -> Any:
            nonlocal count
            count += isinstance(paths[0], int) or any(".ckpt" in str(path) for path in paths)
            if count == at:
                os._exit(137)
            return true(*paths, **options)

        return call

    for name in ("fsync", "replace", "link", "unlink"):
        setattr(os, name, seam(getattr(os, name)))
    os._exit(train.main(arguments))


@pytest.mark.slow
@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.long)])
def test_killed_at_every_seam_of_a_save_the_run_resumes_exactly(
    stride: int, make_config: Make, uninterrupted: Path, tmp_path: Path
) -> None:
    """A2, B15: for every seam, or every third one, until none is left; no half-written file outlives the
    next start.
    """
    config, n = make_config(**HARD), 0
    while True:
        n += stride
        folder = tmp_path / f"seam{n}"
        died = run_and_die(["--config", str(config), *elsewhere(folder)], n)
        if died == 0:
            break
        assert died == 137
        assert run(config, *elsewhere(folder)) == 0
        assert_same_run(uninterrupted, folder)
        assert not list((folder / "checkpoints").glob(".*.tmp"))
        assert len(list((folder / "checkpoints").glob("step-*.ckpt"))) == 2, "keep_last"
        assert {"last.ckpt", "best.ckpt", "final.ckpt"} <= {
            path.name for path in (folder / "checkpoints").iterdir()
        }
    assert n > 30, "four saves have more seams than that"


START = "import os, sys; os.setpgid(0, 0); import train; sys.exit(train.main(sys.argv[1:]))"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long),
        pytest.param(signal.SIGUSR1, 138, marks=pytest.mark.long),
    ],
)
def test_a_signal_to_the_whole_group_saves_too(
    make_config: Make, tmp_path: Path, number: int, code: int
) -> None:
    """C2: Ctrl-C in a terminal reaches the worker processes as well; the run needs them to finish its step."""
    config = make_config(
        training={"max_steps": 100000, "val_every_steps": 100000, "save_every_steps": 100000},
        data={"num_workers": 2},
    )
    process = programs.Program(
        [sys.executable, "-c", START, "--config", str(config)], cwd=ROOT, stderr=subprocess.PIPE
    )
    metrics, began = tmp_path / "logs" / "tiny" / "metrics.csv", time.monotonic()
    while not (metrics.exists() and len(metrics.read_text(encoding="utf-8").splitlines()) > 5):
        assert process.poll() is None and time.monotonic() - began < 120
        time.sleep(0.02)
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, b"Traceback" in error) == (code, False), error.decode()
    assert checkpoint_format.read(tmp_path / "checkpoints" / "last.ckpt")["step"] >= 5


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_workers_of_a_killed_run_end_with_it(make_config: Make, tmp_path: Path) -> None:
    """C6: kill -9 of the run reaches nobody else; its two workers must not wait for it."""
    config = make_config(training={"max_steps": 100000, "log_every_steps": 1})
    child = os.fork()
    if not child:
        os._exit(train.main(["--config", str(config), "data.num_workers=2"]))
    metrics, began = tmp_path / "logs" / "tiny" / "metrics.csv", time.monotonic()
    while not (metrics.exists() and len(metrics.read_text(encoding="utf-8").splitlines()) > 3):
        assert os.waitpid(child, os.WNOHANG)[0] == 0 and time.monotonic() - began < 120
        time.sleep(0.02)
    children = Path(f"/proc/{child}/task/{child}/children").read_text(encoding="ascii").split()
    assert len(children) >= 2
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    began = time.monotonic()
    while any(Path(f"/proc/{worker}").exists() for worker in children):
        assert time.monotonic() - began < 10, children
        time.sleep(0.02)


@pytest.mark.slow
def test_a_reader_that_leaves_does_not_end_the_run(make_config: Make, tmp_path: Path) -> None:
    """C4: 2>&1 | head -2 reads two lines and closes the pipe; the run ends well all the same."""
    command = f"{sys.executable} train.py --config {make_config()} 2>&1 | head -2"
    subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, check=True, timeout=120)
    assert checkpoint_format.read(tmp_path / "checkpoints" / "final.ckpt")["step"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_the_same_as_one(
    make_config: Make, tmp_path: Path, strategy: str
) -> None:
    """Two gloo ranks with 2 rows each are one process with 2 x 2 rows: the same rows, the same mean, up to rounding.

    They stop at step 4 and resume, so that what each strategy saves and restores is in the comparison.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    base = {
        "training": {
            "micro_batch_size": 2,
            "schedule": "constant",
            "sample_prompt": "the",
            "val_every_steps": 2,
        },
        "sampling": {"max_new_tokens": 3},
    }
    assert run(make_config(**base), "training.grad_accum_steps=2", *elsewhere(one)) == 0
    config = make_config(**base)
    flags = ["hardware.devices=2", f"hardware.strategy={strategy}", *elsewhere(two)]
    for steps in (4, 6):
        command = [
            sys.executable,
            "train.py",
            "--config",
            str(config),
            *flags,
            f"training.max_steps={steps}",
        ]
        result = programs.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
    for name in ("train_loss", "val_loss", "grad_norm"):
        ours, theirs = (
            [float.fromhex(x) for x in curve(folder, name).values()] for folder in (one, two)
        )
        assert ours == pytest.approx(theirs, rel=1e-4), name
    assert result.stderr.count("device: cpu") == 1, "only rank 0 writes lines"


@pytest.mark.slow
def test_the_number_of_workers_does_not_change_a_run(
    make_config: Make, uninterrupted: Path, tmp_path: Path
) -> None:
    """A6: also when it changes in the middle."""
    for workers in (1, 2):
        folder = tmp_path / f"workers{workers}"
        assert run(make_config(**HARD), f"data.num_workers={workers}", *elsewhere(folder)) == 0
        assert_same_run(uninterrupted, folder)
    source = uninterrupted / "checkpoints" / "step-000004.ckpt"
    assert (
        run(
            make_config(**HARD),
            "data.num_workers=2",
            "--resume",
            str(source),
            *elsewhere(tmp_path / "mixed"),
        )
        == 0
    )
    assert curve(tmp_path / "mixed")[6] == curve(uninterrupted)[6]
