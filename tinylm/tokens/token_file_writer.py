import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tinylm.common.errors import UserError, printable, reading, reason, require_regular
from tinylm.common.files import replace_file, sync_folder
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.token_file import (
    BLOCK,
    END_BYTES,
    HEADER_BYTES,
    MAGIC,
    VERSION,
    TokenFile,
    _npy_layout,
    _Tally,
    checked_tokens,
)


@contextmanager
def locked(
    path: Path, place: str = "data.cache_dir", waiting: Callable[[], None] | None = None
) -> Iterator[None]:
    """Only one process of this machine makes `path`, whose place a setting decides; the lock dies with its process.

    `waiting` is called where another process has it, before the wait.
    """
    with writing_tokens(path, place):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if waiting is not None:
                waiting()
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def writing_tokens(path: Path, place: str) -> Iterator[None]:
    """Turns errors of the operating system into UserErrors that name the file being made."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{printable(path)}: the token file could not be written: {reason(error)}. Make room, or choose another {place}."
        ) from error


class DraftState(BaseModel):
    """How far a draft has come."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    version: Literal[2] = VERSION
    recipe: str
    cut: str
    """what decides where portions end: numbers of portions mean something only under it"""
    portions: int = Field(default=0, ge=0)
    read: int = Field(default=0, ge=0)
    """documents that were read, also those of the other split"""
    documents: int = Field(default=0, ge=0)
    tokens: int = Field(default=0, ge=0)
    spelled_eos: int = Field(default=0, ge=0)
    """documents whose text has the tokenizer's end of text in characters"""
    separated: bool = False
    """whether a separator was met"""


class Draft:
    """A token file in the making: a folder beside its name with `tokens`, `ends` and `state.json`.

        with Draft(path, tokenizer, recipe, resume=True, keep=True) as draft:
            for tokens, ends in ...:            from portion `draft.state.portions` on
                draft.append(tokens, ends)
            draft.finish(source)

    The state is saved every `SAVE_SECONDS`, behind what it speaks of; what was written after it is cut off when another
    process goes on. `finish` makes the one file, syncs it, renames it and syncs the folder: a file that has its final
    name is whole. The caller holds `locked(path)`.

    Args:
        path: where the file goes.
        tokenizer: what the tokens are.
        recipe: fingerprint of all that they depend on.
        cut: what decides where portions end.
        resume: go on with a draft that was left, if there is one.
        keep: leave what was appended after an error; an interruption leaves it in any case.
        place: the setting that decides where the file goes, for errors.

    Raises:
        UserError: the disk is full, the folder cannot be written, or the draft that was left is another one's.
    """

    SAVE_SECONDS = 5.0

    def __init__(
        self,
        path: Path,
        tokenizer: Tokenizer,
        recipe: str,
        *,
        cut: str = "",
        resume: bool = False,
        keep: bool = False,
        place: str = "data.cache_dir",
    ):
        self.path, self.place, self._keep = path, place, keep
        self.folder = draft_folder(path)
        self.state = DraftState(recipe=recipe, cut=cut)
        self._tally = _Tally(tokenizer)
        self._saved = time.monotonic()
        left = self._left(resume)
        with writing_tokens(path, place), ExitStack() as files:
            if not left:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)
                (self.folder / "tokens").write_bytes(bytes(HEADER_BYTES))
                (self.folder / "ends").touch()
            self._tokens, self._ends = (
                files.enter_context(open(self.folder / name, "r+b")) for name in ("tokens", "ends")
            )
            self._go_on()
            self._files = files.pop_all()

    def _left(self, resume: bool) -> bool:
        """Whether there is a draft to go on with; its state is taken over."""
        path = self.folder / "state.json"
        if not resume or not path.exists():
            return False
        mend = f"Delete {printable(self.folder)} to begin again."
        try:
            state = DraftState.model_validate_json(path.read_bytes())
        except (ValidationError, OSError):
            raise UserError(
                f"{printable(path)}: not the state of an interrupted encoding. {mend}"
            ) from None
        if (state.recipe, state.cut) != (self.state.recipe, self.state.cut):
            raise UserError(
                f"{printable(self.folder)}: was begun with other text, another tokenizer, settings or version. Go on with those, or: {mend}"
            )
        self.state = state
        return True

    def _go_on(self) -> None:
        """Cut off what the state does not know of, and read the rest again for the checksum."""
        stop = HEADER_BYTES + self.state.tokens * self._tally.dtype.itemsize
        for file, size in ((self._tokens, stop), (self._ends, self.state.documents * END_BYTES)):
            if os.fstat(file.fileno()).st_size < size:
                raise UserError(
                    f"{printable(file.name)}: shorter than when the encoding was interrupted. Delete {printable(self.folder)} to begin again."
                )
            file.truncate(size)
        self._ends.seek(0, os.SEEK_END)
        self._tokens.seek(HEADER_BYTES)
        for block in iter(partial(self._tokens.read, BLOCK), b""):
            self._tally.add_tokens(np.frombuffer(block, dtype=self._tally.dtype))

    def __enter__(self) -> "Draft":
        return self

    def append(
        self,
        tokens: np.ndarray,
        ends: np.ndarray,
        *,
        read: int = 0,
        spelled: int = 0,
        separated: bool = False,
    ) -> None:
        """Add a portion: documents behind each other, and where each ends, counted from the first token of the portion.

        `spelled` of them have the end of text in characters; `separated` says whether a separator was met.
        """
        state = self.state
        with writing_tokens(self.path, self.place):
            for start in range(0, len(tokens), BLOCK):  # a document may be very long
                block = checked_tokens(
                    tokens[start : start + BLOCK], self._tally.tokenizer.vocab_size
                )
                self._tokens.write(block.data)
                self._tally.add_tokens(block)
            self._ends.write((ends.astype("<u8") + np.uint64(state.tokens)).data)
            done = {"portions": state.portions + 1, "read": state.read + read}
            done |= {
                "spelled_eos": state.spelled_eos + spelled,
                "separated": state.separated or separated,
            }
            self.state = state.model_copy(
                update={
                    **done,
                    "documents": state.documents + len(ends),
                    "tokens": state.tokens + len(tokens),
                }
            )
            if time.monotonic() > self._saved + self.SAVE_SECONDS:
                self.save()

    def save(self) -> None:
        """Make what there is survive a kill and a power cut."""
        for file in (self._tokens, self._ends):
            file.flush()
            os.fsync(file.fileno())
        replace_file(self.folder / "state.json", self.state.model_dump_json().encode())
        self._saved = time.monotonic()

    def finish(self, source: str, *, unseparated: bool = False) -> None:
        """Make the token file of all that was appended; `source` is the fingerprint of the text, `unseparated` goes into the header."""
        state, digest = self.state, self._tally.digest
        with writing_tokens(self.path, self.place):
            padding = bytes(-self._tokens.tell() % END_BYTES)
            self._ends.seek(0)
            for block in chain([padding], iter(partial(self._ends.read, BLOCK), b"")):
                self._tokens.write(block)
                digest.update(block)
            text = {"spelled_eos": state.spelled_eos, "unseparated": unseparated}
            header = self._tally.header(
                self._tally.dtype.name, state.tokens, state.documents, source, state.recipe, **text
            )
            self._tokens.seek(0)
            self._tokens.write(
                (MAGIC + header.model_dump_json(exclude_defaults=True).encode()).ljust(
                    HEADER_BYTES - 1
                )
                + b"\n"
            )
            self._tokens.flush()
            os.fsync(self._tokens.fileno())
            os.replace(self.folder / "tokens", self.path)
            sync_folder(self.path.parent)
        self._remove()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._files.close()
            return
        worth = self.state.portions > 0 and (self._keep or not issubclass(kind, Exception))
        # A full disk must not hide why the work ended: then the state that was saved before stays.
        with suppress(OSError), self._files:
            if worth:
                self.save()
        if not worth:
            self._remove()

    def _remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def draft_folder(path: Path) -> Path:
    """Where the token file `path` is made."""
    return path.with_name(f".{path.name}.part")


def holds_ids(path: Path, file: TokenFile) -> bool:
    """Whether the NumPy array `path` has the ids of `file`, as `write_npy` writes them.

    Raises:
        UserError: it is no array of ids, or cannot be read.
    """
    require_regular(path)
    with reading(path):
        with open(path, "rb") as array:
            head = array.read(HEADER_BYTES)
        dtype, offset, count = _npy_layout(path, head, os.path.getsize(path), "Delete it.")
    if (dtype, count) != (file.header.dtype, len(file)):
        return False
    ids = np.memmap(path, dtype=file.tokens.dtype, mode="r", offset=offset, shape=(count,))
    return all(
        np.array_equal(ids[start : start + BLOCK], file.tokens[start : start + BLOCK])
        for start in range(0, count, BLOCK)
    )


def write_npy(file: TokenFile, path: Path, place: str) -> None:
    """Write the ids of `file` as a plain NumPy array, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing_tokens(path, place):
            with open(temporary, "wb") as out:
                np.lib.format.write_array_header_1_0(
                    out,
                    {
                        "descr": file.tokens.dtype.str,
                        "fortran_order": False,
                        "shape": file.tokens.shape,
                    },
                )
                for start in range(0, len(file), BLOCK):
                    out.write(file.tokens[start : start + BLOCK].data)
                out.flush()
                os.fsync(out.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
