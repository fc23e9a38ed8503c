"""Checkpoints: written whole or not at all, verified before use, listed, and turned back into a model.

A checkpoint is one zip file as torch.save writes it, of plain types only (dict, list, str, int, float, bool, None, tensor),
read with `weights_only=True`, always. Its zip comment holds the SHA-256 of everything before it, so that a single
flipped bit anywhere is found: torch itself would load it as wrong numbers. The file is written beside its final name,
synced, renamed, and the folder synced; whoever looks sees the old file or the new one, never half of one.

Here stands the project's only torch.load.
"""

import contextlib
import hashlib
import os
import re
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock
import torch

from tinylm.common.errors import UserError, printable, writing
from tinylm.common.files import sync_folder
from tinylm.config.schema import Config

FORMAT = "tinylm"
SCHEMA = 1
# The end-of-central-directory record closes a zip file: 22 bytes, of which the last two are the comment's length.
_END_RECORD = b"PK\x05\x06"
_END_SIZE = 22
_COMMENT_SIZE = len("sha256:") + 64
_STEP_NAME = re.compile(r"step-(\d+)\.ckpt")
_NEEDED_KEYS = {"format", "schema", "stage", "step", "tokens", "config", "tokenizer", "weights"}
# What rebuilding a model takes beside settings and weights: {"path", "fingerprint"} of the base that an adapter belongs to, and
# the config.json of a Hugging Face model as text. What going on with preferences takes: the reference, described as a base is.
# Older checkpoints have none of them.
NO_REFERENCES: dict[str, Any] = {"base": None, "hf_config": None, "reference": None}


class DamagedError(UserError):
    """A checkpoint file that is not what was written, or cannot be read."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself."""

    path: Path
    stage: str
    step: int
    tokens: int
    train_loss: float | None
    val_loss: float | None
    parameters: int
    """of the adapter alone where there is one"""
    bytes: int
    created: float
    """seconds since 1970 at which it was written"""
    shape: str


def write(path: Path, payload: dict[str, Any]) -> None:
    """Write `payload` under `path`, whole or not at all; an older file under that name stays until the new one is safe.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w+b") as file:
            torch.save(payload, file)
            _append_digest(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        _remove(temporary)
        # torch.save turns a write that failed inside its zip writer into a RuntimeError that does not say why.
        reason = (
            error.strerror
            if isinstance(error, OSError) and error.strerror
            else "the disk did not take all of it"
        )
        raise UserError(
            f"{printable(path)}: the checkpoint could not be saved: {printable(reason)} ({_space(path.parent, payload)}). "
            "Make room or choose another training.checkpoint_dir; older checkpoints are untouched."
        ) from error


def link(source: Path, name: str) -> Path:
    """Give the checkpoint `source` a second name in its folder, replacing what had that name; no second copy is written."""
    target, temporary = source.with_name(name), source.with_name(f".{name}.{os.getpid()}.tmp")
    try:
        _remove(temporary)
        os.link(source, temporary)
        os.replace(temporary, target)
        sync_folder(source.parent)
    except OSError as error:
        _remove(temporary)
        raise UserError(
            f"{printable(target)}: could not be made from {printable(source.name)}: {error.strerror}. "
            "Choose a training.checkpoint_dir on a file system with hard links."
        ) from error
    return target


def _append_digest(file: Any) -> None:
    """Write the SHA-256 of the zip file as its comment; the comment's length is part of what is hashed."""
    file.seek(-_END_SIZE, os.SEEK_END)
    if file.read(4) != _END_RECORD:
        raise RuntimeError("torch.save did not end the file with a zip record without comment")
    file.seek(-2, os.SEEK_END)
    file.write(struct.pack("<H", _COMMENT_SIZE))
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0, os.SEEK_END)
    file.write(f"sha256:{digest}".encode())


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock_run_dir(folder: Path, setting: str = "training.checkpoint_dir") -> Iterator[None]:
    """Hold `folder`, the value of `setting`, for this process; the lock dies with the process, so a killed run leaves nothing to clean up.

    What a killed run was writing is removed.

    Raises:
        UserError: another run holds it, or it cannot be written.
    """
    owner, lock = folder / ".owner", filelock.FileLock(folder / ".lock", timeout=0)
    try:
        with writing(folder, setting):
            folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        with writing(folder, setting):
            owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
            for path in folder.glob(".*.tmp"):
                _remove(path)
        yield
    except filelock.Timeout:
        holder = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
        raise UserError(
            f"{printable(folder)}: {printable(holder)} is training into it. Wait for it, or choose another {setting}."
        ) from None
    finally:
        lock.release()


def _space(folder: Path, payload: dict[str, Any]) -> str:
    needed = sum(t.numel() * t.element_size() for t in _tensors(payload))
    if not folder.is_dir():
        return f"about {needed} bytes needed"
    status = os.statvfs(folder)
    return f"about {needed} bytes needed, {status.f_bavail * status.f_frsize} free"


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def read(path: Path) -> dict[str, Any]:
    """The payload that `write` stored: verified, plain types only, tensors on the CPU and mapped from the file.

    Raises:
        DamagedError: the file is not what was written, or was not written by this program.
        UserError: it is not there, or it is of a newer schema.
    """
    verify(path)
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (
        RuntimeError,
        ValueError,
        KeyError,
        EOFError,
        zipfile.BadZipFile,
        torch.serialization.pickle.UnpicklingError,
    ) as error:
        problem = printable(str(error).splitlines()[0][:120])
        raise DamagedError(
            f"{printable(path)}: not a checkpoint of this program: {problem}. Use another checkpoint."
        ) from None
    if (
        not isinstance(payload, dict)
        or payload.get("format") != FORMAT
        or _NEEDED_KEYS - payload.keys()
    ):
        raise DamagedError(
            f"{printable(path)}: not a checkpoint of this program. Use a file that train.py wrote."
        )
    if payload["schema"] > SCHEMA:
        raise UserError(
            f"{printable(path)}: its schema is {payload['schema']}, and this program knows {SCHEMA}. Update the program."
        )
    return NO_REFERENCES | payload


def verify(path: Path) -> None:
    """Check every byte of the file against the digest in it.

    Raises:
        DamagedError: saying what the file looks like instead.
    """
    # os.path, unlike pathlib, has an answer for a name that is too long.
    if not os.path.isfile(path):
        found = "a folder, not a file" if os.path.isdir(path) else "not found"
        raise DamagedError(
            f"{printable(path)}: {found}. Give a .ckpt file; `python list.py` shows them."
        )
    try:
        _check_digest(path)
    except OSError as error:
        raise DamagedError(
            f"{printable(path)}: cannot be read: {error.strerror}. Use another checkpoint."
        ) from None


def _check_digest(path: Path) -> None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - _COMMENT_SIZE))
        comment = file.read()
        if size <= _COMMENT_SIZE or not comment.startswith(b"sha256:"):
            file.seek(0)
            raise DamagedError(
                f"{printable(path)}: damaged: {_looks_like(file.read(200), size)}. Use another checkpoint."
            )
        file.seek(0)
        digest, left = hashlib.sha256(), size - _COMMENT_SIZE
        while left:
            block = file.read(min(left, 1 << 20))
            if not block:
                raise DamagedError(
                    f"{printable(path)}: damaged: it shrank while it was read. Use another checkpoint."
                )
            digest.update(block)
            left -= len(block)
    if comment != f"sha256:{digest.hexdigest()}".encode():
        raise DamagedError(
            f"{printable(path)}: damaged: its SHA-256 is not the one written in it. Use another checkpoint."
        )


def _looks_like(start: bytes, size: int) -> str:
    """What a file that is no checkpoint probably is."""
    if size == 0:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself (run `git lfs pull`)"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "an HTML page, not a checkpoint (was the download an error page?)"
    if start.startswith(b"PK"):
        return "cut short, or not written by this program"
    return "not a checkpoint file"


def candidates(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first.

    By step, as the names say it, and never by the clock. `last`, `final` and `best` are second names of step files, so
    they come after them, for folders into which only those were copied.
    """
    steps = [path for path in folder.glob("step-*.ckpt") if step_of(path) >= 0]
    named = [folder / f"{name}.ckpt" for name in ("last", "final", "best")]
    return sorted(steps, key=step_of, reverse=True) + [path for path in named if path.exists()]


def step_of(path: Path) -> int:
    """The step in a checkpoint's name; -1 for a name without one."""
    match = _STEP_NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def latest_valid(
    folder: Path, passed_over: Callable[[DamagedError], None] = lambda error: None
) -> Path | None:
    """The newest checkpoint in `folder` that verifies; None where there is none at all.

    `passed_over` is told of each damaged one.

    Raises:
        UserError: there are checkpoints and every one is damaged; starting again at step 0 unasked would hide that.
    """
    errors: list[str] = []
    for path in candidates(folder) if os.path.isdir(folder) else []:
        try:
            read(path)
            return path
        except DamagedError as error:
            passed_over(error)
            errors.append(str(error))
    if errors:
        raise UserError(
            f"{printable(folder)}: every checkpoint is damaged: {' '.join(errors)} "
            "Restore one from a backup, or choose another training.checkpoint_dir to start anew."
        )
    return None


def describe(path: Path) -> CheckpointInfo:
    """What the checkpoint at `path` says of itself, after verifying it."""
    return _info(path, read(path))


def _info(path: Path, payload: dict[str, Any]) -> CheckpointInfo:
    # Read as plain values: the settings of another version may be no settings of this one. Older ones have no lora section.
    model, lora = payload["config"]["model"], payload["config"].get("lora")
    # A tied matrix stands in the file under two names, of which the second is the first again.
    weights = {
        weight.data_ptr(): weight.numel()
        for name, weight in payload["weights"].items()
        if name != "head.weight" or not model["tie_embeddings"]
    }
    return CheckpointInfo(
        path=path,
        stage=payload["stage"],
        step=payload["step"],
        tokens=payload["tokens"],
        train_loss=payload["train_loss"],
        val_loss=payload["val_loss"],
        parameters=sum(weights.values()),
        bytes=path.stat().st_size,
        created=payload["created"],
        shape=f"{model['n_layers']}L {model['d_model']}d {model['n_heads']}h"
        + (f" + r{lora['r']}" if lora else ""),
    )


def holds_adapter(path: Path) -> bool:
    """Whether the checkpoint at `path` holds an adapter alone, and no whole model."""
    return Config.from_plain(read(path)["config"]).lora is not None


def info_row(info: CheckpointInfo) -> dict[str, Any]:
    """`info` as plain values for JSON."""
    return {**asdict(info), "path": str(info.path)}
