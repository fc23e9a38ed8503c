"""The checkpoint file: written whole or not at all, verified before use, found by step.

A checkpoint is one zip file as torch.save writes it, of plain types only (dict, list, str, int,
float, bool, None, tensor), always read with `weights_only=True`. Its zip comment is the SHA-256 of
everything before it, so that a single flipped bit anywhere is found: torch itself would load it as
a wrong number. The content of a checkpoint, the state, is one dict:

    format, schema                          "tinylm" and the number of the layout; `old_schemas` reads older ones
    stage, step, tokens                     what was trained, optimizer steps and target tokens so far
    train_loss, val_loss, created           for lists of checkpoints
    config, tokenizer, weights              rebuild the model; of an adapter, `weights` are its matrices alone
    int8, int4                              matrices in 8 and 4 bits, {name: (codes, scale)} and {name: (codes, scale,
                                            offset)}, if it has some; `weights` are the others, in bf16
                                            (`model/rounded.py`)
    hf_config                               config.json of a Hugging Face model as text, else None
    base, reference                         {"path", "fingerprint"} of the model under an adapter, and of the
                                            reference of preference training, else None
    system                                  the most common system turn of its rows, if they have one
    rollouts                                of a run on rewards, saved between two steps on the same
                                            answers: those answers
    optimizer, precision, progress, cursor  resume the run; an imported model has none of these
    data, world_size, threads, versions     fingerprints and numbers that a resumed run is compared with

`write`, `read` and `verify` are the file; `candidates` and `latest_valid` find one; `link` gives it
a second name; `RunLock` keeps a second run out of its folder; which one is the model that a
run ends with is in `result`. This file has the project's only torch.load, and knows nothing of
models: `check` looks for what no run writes, and `load` turns a state into one.
"""

import contextlib
import hashlib
import logging
import os
import pickle
import re
import shutil
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Self

import torch
from filelock import Timeout

# checkpoint.check is imported at its first use
from tinylm import checkpoint as checkpoints
from tinylm.checkpoint.old_schemas import NO_REFERENCES, SCHEMA
from tinylm.common.errors import DamagedError, UserError, first_line, not_found, why_unwritten
from tinylm.common.files import (
    START_BYTES,
    atomic_path,
    open_regular,
    read_regular,
    remove,
    temporary_lock,
    writing,
)

__all__ = ["NO_REFERENCES", "SCHEMA"]  # of old_schemas, for code that writes a state

logger = logging.getLogger(__name__)

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
)
_ANOTHER = "Use another checkpoint"
_FOREIGN_CODE = "It was refused: reading such a file can run code that is in it"


# --- one file ---


def write(path: Path, state: dict[str, Any], setting: str = "training.checkpoint_dir") -> None:
    """Write `state` to `path`, whole or not at all;
    an older file of that name stays until the new one is on the disk.

    Args:
        path: the file, in a folder that is created if it does not exist.
        state: its content.
        setting: the setting or argument that decides where the file is, for errors.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    output = _Output()
    try:
        with atomic_path(path) as temporary, open(temporary, "w+b") as output.file:
            torch.save(state, output)
            _append_digest(output.file)
    except (OSError, RuntimeError) as error:
        why, fix = why_unwritten(output.error or error)
        problem = f"the checkpoint could not be saved: {why} ({_space(path.parent, state)})"
        raise UserError(
            path, problem, f"{fix}; older checkpoints are unchanged", setting
        ) from error


class _Output:
    """A file for torch.save, whose zip writer turns a failed write into a RuntimeError
    without the reason.
    """

    file: IO[bytes]
    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


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
    if not os.path.isdir(folder):
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
    except pickle.UnpicklingError:
        problem = f"holds more than plain data. {_FOREIGN_CODE}"
        raise DamagedError(path, problem, _ANOTHER) from None
    except _LOAD_ERRORS as error:
        why = first_line(error)
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
        problem = "a folder, not a file" if os.path.isdir(path) else not_found(path)
        if os.path.exists(path) and not os.path.isdir(path):
            problem = "not a regular file"
        raise DamagedError(path, problem, "Give a .ckpt file; `python list.py` lists them")
    try:
        damage = _damage(path)
    except UserError as error:  # it cannot be opened, or is a file of another kind
        raise DamagedError(path, error.problem, error.fix) from None
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
            return _looks_like(path, file.read(START_BYTES))
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


def _looks_like(path: Path, start: bytes) -> str:
    """A guess at the kind of a file that is not a checkpoint."""
    if not start:
        return "the file is empty"
    if start.startswith(b"\x80") or zipfile.is_zipfile(path):
        return f"not written by this program. {_FOREIGN_CODE}"
    if start.startswith(b"PK"):
        return "cut short"
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


class RunLock:
    """Holds a folder of a run for this process, in a `with` block; the lock ends with the process,
    also by a kill.

    Args:
        folder: it is created if it does not exist; unfinished files that a killed run left there
            are removed. At the end it is removed if it is empty and was created for this run.
        setting: the setting that names it, for errors.

    Raises:
        UserError: another run holds the folder, or it cannot be written.
    """

    def __init__(self, folder: Path, setting: str = "training.checkpoint_dir"):
        self.folder = folder
        self.setting = setting
        self._owner = f"process {os.getpid()} on {socket.gethostname()}"
        self._stack = contextlib.ExitStack()
        self._stat: os.stat_result | None = None

    def __enter__(self) -> Self:
        owner, file = self.folder / ".owner", self.folder / ".lock"
        try:
            self._stack.enter_context(temporary_lock(file, self.setting, timeout=0))
        except Timeout:
            holder = read_regular(owner).decode() if owner.exists() else "another process"
            fix = f"Wait for it, or choose another {self.setting}"
            raise UserError(self.folder, f"in use by {holder}", fix) from None
        self._stack.callback(self._remove_owner)
        with writing(self.folder, self.setting):
            self._stat = file.stat()
            owner.write_text(self._owner, encoding="utf-8")
            for path in self.folder.glob(".*.tmp"):
                remove(path)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def renew(self) -> None:
        """Take the lock again if the folder, or its lock file, was removed while it was held.

        Raises:
            UserError: another run holds it now, or it cannot be written.
        """
        file = self.folder / ".lock"
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if self._stat is not None and os.path.samestat(file.stat(), self._stat):
                return
        logger.warning(f"{self.folder} was removed during the run; it is made again")
        self._stack.close()
        self._stat = None
        self.__enter__()

    def _remove_owner(self) -> None:
        owner = self.folder / ".owner"
        with contextlib.suppress(OSError, UserError):  # the folder was removed
            if read_regular(owner).decode() == self._owner:
                owner.unlink()
