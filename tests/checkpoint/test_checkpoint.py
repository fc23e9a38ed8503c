"""Checkpoint files: whole or missing, verified to the last bit, plain types only (FAULTS: B1-B9, B16, H1)."""

import errno
import io
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tinylm.checkpoint import format as checkpoint_format
from tinylm.checkpoint import load as checkpoint_load
from tinylm.common.errors import DamagedError, UserError
from tinylm.config.schema import Config
from tinylm.model.decoder import Decoder
from tinylm.tokenizer.factory import make_tokenizer


def make_state(step: int = 3, **changes: Any) -> dict[str, Any]:
    """The state of a small real checkpoint: a decoder of one layer."""
    config = Config.model_validate(
        {"model": {"vocab_size": 260, "n_layers": 1, "d_model": 8, "n_heads": 2}}
    )
    torch.manual_seed(step)
    return {
        "format": checkpoint_format.FORMAT,
        "schema": checkpoint_format.SCHEMA,
        "stage": "pretrain",
        "step": step,
        "tokens": 10 * step,
        "train_loss": 2.5,
        "val_loss": None,
        "created": 1.0,
        "config": config.to_plain(),
        "tokenizer": make_tokenizer(config.tokenizer).to_plain(),
        "weights": Decoder(config.model).state_dict(),
    } | changes


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A valid checkpoint of step 3."""
    path = tmp_path / "step-000003.ckpt"
    checkpoint_format.write(path, make_state())
    return path


def test_a_state_that_is_written_and_read_is_the_same(saved: Path) -> None:
    """Round trip: every weight has the same bits, and the model computes with them; keys that older files lack are
    added.
    """
    before, after = checkpoint_format.NO_REFERENCES | make_state(), checkpoint_format.read(saved)
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before["weights"][name], after["weights"][name]) for name in before["weights"]
    )
    loaded = checkpoint_load.load_model(str(saved))  # a path as text too
    assert loaded.model.head.weight is loaded.model.embedding.weight
    assert (loaded.info.step, loaded.info.tokens, loaded.info.train_loss, loaded.info.val_loss) == (
        3,
        30,
        2.5,
        None,
    )
    # embedding 260*8, qkv 8*24, out 8*8, swiglu 64 wide: up 8*128 and down 64*8, three norms of 8; the tied head
    # counts once
    assert loaded.info.parameters == 260 * 8 + 8 * 24 + 8 * 8 + 8 * 128 + 64 * 8 + 3 * 8


def test_other_tools_open_it(saved: Path) -> None:
    """The digest is a zip comment, which torch.load and zip tools ignore."""
    assert torch.load(saved, weights_only=True)["step"] == 3


def test_a_flipped_bit_is_found_wherever_it_is(saved: Path) -> None:
    """B2: 50 seeded places over the whole file; the digest covers headers and padding too."""
    good, chance = saved.read_bytes(), random.Random(0)
    for _ in range(50):
        place, bit = chance.randrange(len(good)), chance.randrange(8)
        bad = bytearray(good)
        bad[place] ^= 1 << bit
        saved.write_bytes(bad)
        with pytest.raises(DamagedError, match=r"step-000003\.ckpt: damaged: "):
            checkpoint_format.read(saved)


def test_without_the_digest_torch_loads_a_flipped_bit_as_a_wrong_number(saved: Path) -> None:
    """NEG: torch.load returns a changed weight without an error."""
    good = saved.read_bytes()
    weight = make_state()["weights"]["embedding.weight"].numpy().tobytes()
    bad = bytearray(good)
    bad[good.index(weight) + 2] ^= 1
    saved.write_bytes(bad)
    assert not torch.equal(
        torch.load(saved, weights_only=True)["weights"]["embedding.weight"],
        make_state()["weights"]["embedding.weight"],
    )


@pytest.mark.parametrize("eighths", range(8))
def test_a_cut_file_is_skipped_for_the_one_before(saved: Path, eighths: int) -> None:
    """B1: the newest is cut to each eighth of its length, down to nothing."""
    newer = saved.with_name("step-000004.ckpt")
    checkpoint_format.write(newer, make_state(4))
    newer.write_bytes(newer.read_bytes()[: newer.stat().st_size * eighths // 8])
    skipped: list[DamagedError] = []
    assert checkpoint_format.latest_valid(saved.parent, skipped.append) == saved
    assert skipped[0].where == (str(newer),)
    assert str(skipped[0].problem).startswith("damaged: ")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n" * 9, "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>" + b"x" * 200, "an HTML page"),
        (b"", "the file is empty"),
        (b"\0" * 500, "not a checkpoint file"),
    ],
)
def test_the_error_says_what_the_file_looks_like(saved: Path, content: bytes, words: str) -> None:
    """B3."""
    saved.write_bytes(content)
    with pytest.raises(DamagedError, match=words):
        checkpoint_format.read(saved)


def test_a_zeroed_tail_is_found(saved: Path) -> None:
    """B3: some file systems leave such a file after a power cut."""
    good = saved.read_bytes()
    saved.write_bytes(good[:-300] + b"\0" * 300)
    with pytest.raises(DamagedError):
        checkpoint_format.read(saved)


def test_all_damaged_is_an_error_that_lists_each(saved: Path) -> None:
    """B4: never a silent start at step 0."""
    other = saved.with_name("step-000002.ckpt")
    for path in (saved, other):
        path.write_bytes(b"broken")
    with pytest.raises(
        UserError,
        match=r"every checkpoint is damaged \(.*step-000003.*step-000002.*choose another training\.checkpoint_dir",
    ):
        checkpoint_format.latest_valid(saved.parent)


def test_newest_is_by_step_and_not_by_the_clock(saved: Path) -> None:
    """C8: the older step was touched last; 10 is more than 9 although its name sorts before it."""
    for step in (10, 9):
        checkpoint_format.write(saved.with_name(f"step-{step}.ckpt"), make_state(step))
    os.utime(saved, (4e9, 4e9))
    assert checkpoint_format.latest_valid(saved.parent) == saved.with_name("step-10.ckpt")


def test_an_empty_folder_has_no_newest(tmp_path: Path) -> None:
    """No checkpoint is not an error: a run starts there."""
    assert checkpoint_format.latest_valid(tmp_path) is None


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_file_and_no_half_one(saved: Path) -> None:
    """B5: a child that may write at most 4096 bytes to a file tries to replace a checkpoint."""
    before = saved.read_bytes()
    code = f"""
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from tests.checkpoint.test_checkpoint import make_state
from tinylm.checkpoint import format as checkpoint
from tinylm.common.errors import UserError
data = make_state()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    checkpoint.write(Path({str(saved)!r}), data)
except UserError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    assert "could not be saved: File too large" in result.stdout
    assert "bytes needed" in result.stdout and "free" in result.stdout
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_refused_rename_or_sync_keeps_the_old_file(
    saved: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """B6, B7: a failed save is an error and is not tried again."""
    before, calls = saved.read_bytes(), []

    def refuse(*args: Any) -> None:
        calls.append(args)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, function, refuse)
    with pytest.raises(
        UserError, match=r"could not be saved: Permission denied .*older checkpoints are unchanged"
    ):
        checkpoint_format.write(saved, make_state(4))
    assert saved.read_bytes() == before
    assert len(calls) == 1
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_the_order_is_sync_rename_sync_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B9: the content is on the disk before the name, and the name before `write` returns."""
    calls: list[str] = []
    true_sync, true_replace = os.fsync, os.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda handle: (
            calls.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file"),
            true_sync(handle),
        )[1],
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), true_replace(a, b))[1])
    checkpoint_format.write(tmp_path / "step-000001.ckpt", make_state())
    assert calls == ["file", "rename", "folder"]


def test_the_temporary_folder_of_the_system_is_not_used(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B8: TMPDIR may be missing or full."""
    monkeypatch.setenv("TMPDIR", "/nowhere")
    checkpoint_format.write(saved, make_state(5))
    assert checkpoint_format.read(saved)["step"] == 5


def test_a_second_name_is_the_same_file(saved: Path) -> None:
    """last.ckpt needs no second copy on the disk."""
    assert checkpoint_format.link(saved, "last.ckpt").samefile(saved)


class RunsCode:
    """A pickle that runs code when it is loaded."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("force", ["0", "1"])
@pytest.mark.parametrize("signed", [False, True])
def test_a_pickle_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: str, signed: bool
) -> None:
    """H1: bare pickle and torch file, with and without a valid digest, with the variable that switches torch's
    guard off.
    """
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)
    path, target = tmp_path / "step-000001.ckpt", tmp_path / "touched"
    if signed:
        checkpoint_format.write(path, {"format": checkpoint_format.FORMAT, "bad": RunsCode(target)})
    else:
        path.write_bytes(pickle.dumps(RunsCode(target)) + b"x" * 200)
    refused = (
        "It was refused: reading such a file can run code that is in it. Use another checkpoint."
    )
    problem = "holds more than plain data" if signed else "damaged: not written by this program"
    with pytest.raises(DamagedError) as caught:
        checkpoint_format.read(path)
    assert str(caught.value) == f"{path}: {problem}. {refused}"
    assert not target.exists()


def test_a_newer_schema_is_an_error_that_names_both(saved: Path) -> None:
    """B14: the schema of the file and the newest that is known."""
    checkpoint_format.write(saved, make_state(schema=99))
    with pytest.raises(
        UserError, match="has schema 99, but this version reads up to schema 2. Update this program"
    ):
        checkpoint_format.read(saved)


@pytest.mark.parametrize("name", ["x" * 300, "folder.ckpt", "nothing.ckpt"])
def test_what_cannot_be_read_is_one_line(tmp_path: Path, name: str) -> None:
    """E8: a name that is too long, a folder, a missing file."""
    (tmp_path / "folder.ckpt").mkdir()
    with pytest.raises(
        DamagedError, match=r"(not found|a folder, not a file)\. Give a \.ckpt file"
    ):
        checkpoint_format.read(tmp_path / name)
    assert checkpoint_format.latest_valid(tmp_path / ("x" * 300)) is None


def test_another_programs_torch_file_is_refused(tmp_path: Path) -> None:
    """A file of plain tensors with a valid digest is not a checkpoint of this program."""
    path = tmp_path / "model.ckpt"
    checkpoint_format.write(path, {"weights": torch.zeros(2)})
    with pytest.raises(DamagedError, match="not a checkpoint of this program"):
        checkpoint_format.read(path)


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    """G1: the second one gets an error that names the holder; G2: the lock is free again at once; leftovers of a
    killed run are removed.
    """
    leftover = tmp_path / ".step-000001.ckpt.1.tmp"
    leftover.write_bytes(b"half")
    with checkpoint_format.RunLock(tmp_path):
        assert not leftover.exists()
        with (
            pytest.raises(UserError, match=f"in use by process {os.getpid()} on "),
            checkpoint_format.RunLock(tmp_path),
        ):
            pass
    with checkpoint_format.RunLock(tmp_path):
        pass


def test_a_run_leaves_no_lock_and_no_folder_that_it_did_not_fill(tmp_path: Path) -> None:
    """A run that ends before its first save leaves nothing."""
    with checkpoint_format.RunLock(tmp_path / "runs" / "a"):
        assert (tmp_path / "runs" / "a" / ".lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_removed_while_it_is_held_is_locked_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """B10: another run must not be able to take the new folder."""
    folder = tmp_path / "run"
    with checkpoint_format.RunLock(folder) as lock:
        lock.renew()
        assert caplog.messages == []
        shutil.rmtree(folder)
        lock.renew()
        assert caplog.messages == [f"{folder} was removed during the run; it is made again"]
        with pytest.raises(UserError, match="in use by"), checkpoint_format.RunLock(folder):
            pass


def test_a_folder_that_another_run_made_after_a_removal_is_left_to_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with checkpoint_format.RunLock(folder) as lock:
        shutil.rmtree(folder)
        with checkpoint_format.RunLock(folder):
            (folder / "step-000001.ckpt").write_bytes(b"theirs")
            (folder / ".owner").write_text("process 7 on another machine")
            with pytest.raises(UserError, match="in use by process 7 on another machine"):
                lock.renew()
            assert (folder / ".lock").exists()


def test_a_file_in_place_of_a_held_folder_is_an_error(tmp_path: Path) -> None:
    """B11: named with its setting, without a traceback."""
    folder = tmp_path / "run"
    with checkpoint_format.RunLock(folder) as lock:
        shutil.rmtree(folder)
        folder.write_text("a file")
        with pytest.raises(UserError) as caught:
            lock.renew()
        assert str(caught.value) == (
            f"{folder}: cannot be written: File exists. "
            "Change training.checkpoint_dir, or move the file that is there."
        )
    assert folder.read_text() == "a file"


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "Free disk space or change OUT"),
        (errno.EIO, "Check the disk, or change OUT"),
        (errno.EDQUOT, "Free disk space or change OUT"),
    ],
)
def test_a_refused_save_has_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fix: str
) -> None:
    """torch.save turns it into a RuntimeError without one."""

    class Refusing(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr("builtins.open", lambda *_: Refusing())
    with pytest.raises(UserError) as caught:
        checkpoint_format.write(tmp_path / "a.ckpt", make_state(), "OUT")
    assert caught.value.problem.startswith(
        f"the checkpoint could not be saved: {os.strerror(number)} (about "
    )
    assert caught.value.fix == f"{fix}; older checkpoints are unchanged"
