"""The checkpoint file: written whole or not at all, verified before use, found by step.

A checkpoint is one zip file as torch.save writes it, of plain types only (dict, list, str, int,
float, bool, None, tensor), always read with `weights_only=True`. Its zip comment is the SHA-256 of
everything before it, so that a single flipped bit anywhere is found: torch itself would load it as
a wrong number. The content of a checkpoint, the state, is one dict:

    format, schema                          "tinylm" and the number of the layout; `old_schemas` reads older ones
    stage, step, tokens                     what was trained, optimizer steps and target tokens so far
    train_loss, val_loss, created           for lists of checkpoints
    config, tokenizer, weights              rebuild the model; of an adapter, `weights` are its matrices alone
    hf_config                               config.json of a Hugging Face model as text, else None
    base, reference                         {"path", "fingerprint"} of the model under an adapter, and of the
                                            reference of preference training, else None
    system                                  the most common system turn of its rows, if they have one
    optimizer, precision, progress, cursor  resume the run; an imported model has none of these
    data, world_size, threads, versions     fingerprints and numbers that a resumed run is compared with

`write`, `read` and `verify` are the file; `candidates` and `latest_valid` find one; `link` gives it
a second name; `lock_run_dir` keeps a second run out of its folder; which one is the model that a
run ends with is in `result`. This file has the project's only torch.load, and knows nothing of
models: `check` looks for what no run writes, and `load` turns a state into one.
"""

import contextlib
import hashlib
import os
import pickle
import re
import shutil
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

# checkpoint.check is imported at its first use
from tinylm import checkpoint as checkpoints
from tinylm.checkpoint.old_schemas import NO_REFERENCES, SCHEMA
from tinylm.common.errors import UserError, open_regular, read_regular, writing
from tinylm.common.files import atomic_path

__all__ = ["NO_REFERENCES", "SCHEMA"]  # of old_schemas, for code that writes a state

FORMAT = "tinylm"
# A zip file ends with this record of 22 bytes; its last two are the length of the comment after it.
_END_RECORD = b"PK\x05\x06"
_END_SIZE = 22
_COMMENT_SIZE = len("sha256:") + 64
_STEP_NAME = re.compile(r"step-(\d+)\.ckpt")
# What torch.load raises for a file that it cannot read.
_LOAD_ERRORS = (
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    EOFError,
    struct.error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)
_ANOTHER = "Use another checkpoint"


class DamagedError(UserError):
    """A checkpoint file that was changed after it was written, cannot be read,
    or was not written by this program.
    """


# --- one file ---


def write(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`, whole or not at all;
    an older file of that name stays until the new one is on the disk.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    try:
        with atomic_path(path) as temporary, open(temporary, "w+b") as file:
            torch.save(state, file)
            _append_digest(file)
    except (OSError, RuntimeError) as error:
        # torch.save turns a failed write inside its zip writer into a RuntimeError
        # without the reason.
        why = "the disk did not take all of it"
        if isinstance(error, OSError) and error.strerror:
            why = error.strerror
        problem = f"the checkpoint could not be saved: {why} ({_space(path.parent, state)})"
        fix = (
            "Free some space or choose another training.checkpoint_dir; "
            "older checkpoints are unchanged"
        )
        raise UserError(path, problem, fix) from error


def _append_digest(file: Any) -> None:
    """Write the SHA-256 of the zip file as its comment;
    the comment's length is part of what is hashed.
    """
    file.seek(-_END_SIZE, os.SEEK_END)
    if file.read(4) != _END_RECORD:
        raise RuntimeError("torch.save did not end the file with a zip record without comment")
    file.seek(-2, os.SEEK_END)
    file.write(struct.pack("<H", _COMMENT_SIZE))
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0, os.SEEK_END)
    file.write(f"sha256:{digest}".encode())


def _space(folder: Path, state: dict[str, Any]) -> str:
    """The bytes that `state` needs, and those that are free."""
    needed = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(state))
    if not folder.is_dir():
        return f"about {needed} bytes needed"
    return f"about {needed} bytes needed, {shutil.disk_usage(folder).free} free"


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def read(path: Path) -> dict[str, Any]:
    """The state that `write` stored: verified, checked, plain types only,
    tensors on the CPU and mapped from the file.

    A checkpoint of an older schema is returned in the form of the current one.

    Raises:
        DamagedError: the file is not what was written, or its content is not what this program
            writes, or a weight is not a finite number.
        UserError: it has a newer schema.
    """
    verify(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _LOAD_ERRORS as error:
        why = str(error).splitlines()[0][:120]
        raise DamagedError(path, f"not a checkpoint of this program ({why})", _ANOTHER) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        fix = "Use a file that train.py wrote"
        raise DamagedError(path, "not a checkpoint of this program", fix)
    return checkpoints.check.checked(path, state)


def verify(path: Path) -> None:
    """Check every byte of the file against the digest in it.

    Raises:
        DamagedError: saying what the file looks like instead.
    """
    # os.path, unlike pathlib, returns False for a name that is too long.
    if not os.path.isfile(path):
        problem = "a folder, not a file" if os.path.isdir(path) else "not found"
        raise DamagedError(path, problem, "Give a .ckpt file; `python list.py` lists them")
    try:
        damage = _damage(path)
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
        raise DamagedError(path, problem, _ANOTHER) from None
    if damage is not None:
        raise DamagedError(path, f"damaged: {damage}", _ANOTHER)


def _damage(path: Path) -> str | None:
    """The problem with the file; None if its digest is right."""
    size = path.stat().st_size
    with open_regular(path) as file:
        file.seek(max(0, size - _COMMENT_SIZE))
        comment = file.read()
        file.seek(0)
        if size <= _COMMENT_SIZE or not comment.startswith(b"sha256:"):
            return _looks_like(file.read(200), size)
        digest, left = hashlib.sha256(), size - _COMMENT_SIZE
        while left:
            block = file.read(min(left, 1 << 20))
            if not block:
                return "the file became shorter while it was read"
            digest.update(block)
            left -= len(block)
    if comment != f"sha256:{digest.hexdigest()}".encode():
        return "its SHA-256 is not the one stored in it"
    return None


def _looks_like(start: bytes, size: int) -> str:
    """A guess at the kind of a file that is not a checkpoint."""
    if size == 0:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself (run `git lfs pull`)"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "an HTML page, not a checkpoint (was the download an error page?)"
    if start.startswith(b"PK"):
        return "cut short, or not written by this program"
    return "not a checkpoint file"


def link(source: Path, name: str) -> Path:
    """Give the checkpoint `source` a second name in its folder by a hard link,
    replacing what had that name.
    """
    target = source.with_name(name)
    if target.exists() and target.samefile(source):
        return target
    try:
        with atomic_path(target) as temporary:
            os.link(source, temporary)
    except OSError as error:
        problem = f"could not be linked to {source.name}: {error.strerror}"
        fix = "Choose a training.checkpoint_dir on a file system with hard links"
        raise UserError(target, problem, fix) from error
    return target


# --- the folder of a run ---


def candidates(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first.

    Newest by the step in the name, never by the clock. `last`, `final` and `best` are second names
    of step files, so they come after these, for folders into which only they were copied.
    """
    steps = [path for path in folder.glob("step-*.ckpt") if step_of(path) >= 0]
    named = [folder / f"{name}.ckpt" for name in ("last", "final", "best")]
    return sorted(steps, key=step_of, reverse=True) + [path for path in named if path.exists()]


def step_of(path: Path) -> int:
    """The step in a checkpoint's name; -1 for a name without one."""
    match = _STEP_NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def latest_valid(
    folder: Path, on_damaged: Callable[[DamagedError], None] = lambda error: None
) -> Path | None:
    """The path of `latest_state`."""
    found = latest_state(folder, on_damaged)
    return None if found is None else found[0]


def latest_state(
    folder: Path, on_damaged: Callable[[DamagedError], None] = lambda error: None
) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint in `folder` that can be read and has finite weights, and its state;
    None if there is none.

    Args:
        folder: it may be missing.
        on_damaged: called with the error of each damaged or diverged checkpoint that is skipped.

    Raises:
        UserError: every checkpoint is damaged; starting again at step 0
            without asking would hide that.
    """
    errors: list[DamagedError] = []
    for path in candidates(folder) if os.path.isdir(folder) else []:
        try:
            return path, read(path)
        except DamagedError as error:
            on_damaged(error)
            errors.append(error)
    if errors:
        found = "; ".join(f"{error.where[-1]}: {error.problem}" for error in errors)
        fix = "Restore one from a backup, or choose another training.checkpoint_dir to start again"
        raise UserError(folder, f"every checkpoint is damaged ({found})", fix)
    return None


@contextlib.contextmanager
def lock_run_dir(folder: Path, setting: str = "training.checkpoint_dir") -> Iterator[None]:
    """Hold `folder`, the value of `setting`, for this process; the lock ends with the process,
    also if it is killed.

    Unfinished files that a killed run left are removed.

    Raises:
        UserError: another run holds it, or it cannot be written.
    """
    owner, lock = folder / ".owner", FileLock(folder / ".lock", timeout=0)
    try:
        with writing(folder, setting):
            folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        with writing(folder, setting):
            owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
            for path in folder.glob(".*.tmp"):
                path.unlink()
        yield
    except Timeout:
        holder = read_regular(owner).decode() if owner.exists() else "another process"
        fix = f"Wait for it, or choose another {setting}"
        raise UserError(folder, f"in use by {holder}", fix) from None
    finally:
        lock.release()
