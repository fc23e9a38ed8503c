"""Write a token file in chunks, so that an interrupted encoding continues where it was.

chunk by chunk ─▶ a folder `.NAME.part` with tokens, ends, state.json ─▶ finish ─▶ the token file, whole
"""

import hashlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tinylm.common.errors import UserError
from tinylm.common.files import publish, read_regular, write_atomic, writing
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.token_file import (
    BLOCK,
    END_BYTES,
    HEADER_BYTES,
    MAGIC,
    VERSION,
    TokenFileHeader,
    checked_tokens,
    token_dtype,
)


class WriterState(BaseModel):
    """How much of a token file is written; saved after the data that it counts."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    version: Literal[2] = VERSION
    recipe: str
    cut: str
    """what decides where chunks end: a number of chunks only has a meaning with it"""
    portions: int = Field(default=0, ge=0)
    """chunks"""
    read: int = Field(default=0, ge=0)
    """documents that were read, also those of the other split"""
    documents: int = Field(default=0, ge=0)
    tokens: int = Field(default=0, ge=0)
    spelled_eos: int = Field(default=0, ge=0)
    """documents whose text contains the name of the end-of-text token as characters"""
    end_marks: dict[str, int] = Field(default={})
    """end marks of other tokenizers, and how many documents contain each"""
    separated: bool = False
    """whether a separator was found"""


class TokenFileWriter(AbstractContextManager["TokenFileWriter"]):
    """Writes a token file in chunks, in a folder beside its name.

        with TokenFileWriter(path, tokenizer, recipe, resume=True, keep=True) as writer:
            for tokens, ends in ...:            from chunk number `writer.state.portions` on
                writer.append(tokens, ends)
            writer.finish(source)

    The state is saved every `SAVE_SECONDS`, after the data that it counts; a process that continues
    truncates what was written after it. A file with its final name is complete. The caller holds
    `common.files.locked(path)`.

    Args:
        path: the final place of the file.
        tokenizer: the tokenizer of the tokens.
        recipe: fingerprint of everything the tokens depend on.
        cut: what decides where chunks end.
        resume: continue with the folder of an interrupted writer, if there is one.
        keep: keep the folder after an error; after an interruption it is always kept.
        setting: the setting or flag that decides where the file is, for errors.

    Raises:
        UserError: the disk is full, the folder cannot be written, or it is that of another file.
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
        setting: str = "data.cache_dir",
    ):
        self.path = path
        self.setting = setting
        self.folder = writer_folder(path)
        self.state = WriterState(recipe=recipe, cut=cut)
        self._keep = keep
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        # of the finished file, while its bytes pass
        self._digest = hashlib.sha256()
        self._text_bytes = 0
        self._byte_lengths = np.array(tokenizer.byte_lengths(), dtype=np.uint32)
        self._saved = time.monotonic()
        left = resume and (self.folder / "state.json").exists()
        if left:
            self.state = self._read_state()
        with writing(path, setting):
            if not left:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)
                (self.folder / "tokens").write_bytes(bytes(HEADER_BYTES))
                (self.folder / "ends").touch()
            self._tokens_file = open(self.folder / "tokens", "r+b")  # noqa: SIM115 (closed in __exit__)
            self._ends_file = open(self.folder / "ends", "r+b")  # noqa: SIM115
            self._tokens_file.seek(HEADER_BYTES)
            if left:
                try:
                    self._continue()
                except BaseException:
                    self._tokens_file.close()
                    self._ends_file.close()
                    raise

    def _read_state(self) -> WriterState:
        """The state of the interrupted writer."""
        path = self.folder / "state.json"
        fix = f"Delete {self.folder} to start again"
        try:
            state = WriterState.model_validate_json(read_regular(path))
        except (ValidationError, UserError):
            raise UserError(path, "not the state of an interrupted encoding", fix) from None
        if (state.recipe, state.cut) != (self.state.recipe, self.state.cut):
            problem = "was started with another text, tokenizer, settings or version"
            raise UserError(self.folder, problem, f"Continue with those, or: {fix}")
        return state

    def _continue(self) -> None:
        """Remove what the state does not count, and read the rest again for the checksum."""
        n_bytes = HEADER_BYTES + self.state.tokens * self._dtype.itemsize
        for file, size in (
            (self._tokens_file, n_bytes),
            (self._ends_file, self.state.documents * END_BYTES),
        ):
            if os.fstat(file.fileno()).st_size < size:
                problem = "shorter than when the encoding was interrupted"
                raise UserError(file.name, problem, f"Delete {self.folder} to start again")
            file.truncate(size)
        self._ends_file.seek(0, os.SEEK_END)
        for block in iter(partial(self._tokens_file.read, BLOCK), b""):
            self._count(np.frombuffer(block, dtype=self._dtype))

    def _count(self, tokens: np.ndarray) -> None:
        """Include the next tokens of the file, (n,), in its checksum and its bytes of text."""
        self._digest.update(tokens.data)
        self._text_bytes += int(self._byte_lengths[tokens].sum(dtype=np.int64))

    def append(
        self,
        tokens: np.ndarray,
        ends: np.ndarray,
        *,
        read: int = 0,
        spelled: int = 0,
        marks: Mapping[str, int] | None = None,
        separated: bool = False,
    ) -> None:
        """Add a chunk.

        Args:
            tokens: (n,) the tokens of its documents, one after the other.
            ends: (d,) where each document ends in `tokens`.
            read: documents that were read for it, also those of the other split.
            spelled: documents whose text contains the name of the end-of-text token as characters.
            marks: how many documents contain each end mark of another tokenizer.
            separated: whether a separator was found.
        """
        state = self.state
        with writing(self.path, self.setting):
            for start in range(0, len(tokens), BLOCK):  # a document may be very long
                part = tokens[start : start + BLOCK]
                block = checked_tokens(part, self._tokenizer.vocab_size)
                self._tokens_file.write(block.data)
                self._count(block)
            self._ends_file.write((ends.astype("<u8") + np.uint64(state.tokens)).data)
            changes = {
                "portions": state.portions + 1,
                "read": state.read + read,
                "documents": state.documents + len(ends),
                "tokens": state.tokens + len(tokens),
                "spelled_eos": state.spelled_eos + spelled,
                "end_marks": dict(Counter(state.end_marks) + Counter(marks or {})),
                "separated": state.separated or separated,
            }
            self.state = state.model_copy(update=changes)
            if time.monotonic() > self._saved + self.SAVE_SECONDS:
                self.save()

    def save(self) -> None:
        """Make the work so far survive a kill and a power cut."""
        for file in (self._tokens_file, self._ends_file):
            file.flush()
            os.fsync(file.fileno())
        state = self.state.model_dump_json()
        write_atomic(self.folder / "state.json", state, self.setting)
        self._saved = time.monotonic()

    def finish(self, text_fingerprint: str, *, unseparated: bool = False) -> None:
        """Make the token file of all chunks.

        Args:
            text_fingerprint: of the text that was encoded.
            unseparated: whether a separator was given that does not occur in the text.
        """
        state = self.state
        with writing(self.path, self.setting):
            # 1. after the tokens: zeros up to a multiple of 8 bytes, then the ends of the documents
            self._ends_file.seek(0)
            block = bytes(-self._tokens_file.tell() % END_BYTES)
            while True:
                self._tokens_file.write(block)
                self._digest.update(block)
                block = self._ends_file.read(BLOCK)
                if not block:
                    break
            # 2. before them: the header, whose checksum is complete now
            header = finished_header(
                self._tokenizer,
                self._digest,
                dtype=self._dtype.name,
                count=state.tokens,
                documents=state.documents,
                text_bytes=self._text_bytes,
                source=text_fingerprint,
                recipe=state.recipe,
                spelled_eos=state.spelled_eos,
                end_marks=state.end_marks,
                unseparated=unseparated,
            )
            line = MAGIC + header.model_dump_json(exclude_defaults=True).encode()
            self._tokens_file.seek(0)
            self._tokens_file.write(line.ljust(HEADER_BYTES - 1) + b"\n")
            self._tokens_file.flush()
            # 3. the final name
            publish(self.folder / "tokens", self.path)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        keep = self.state.portions > 0 and (self._keep or interrupted)
        try:
            if kind is not None and keep:
                # A full disk must not hide why the work ended: the state
                # that was saved before is used then.
                with suppress(OSError, UserError):
                    self.save()
        finally:
            for file in (self._tokens_file, self._ends_file):
                with suppress(OSError):
                    file.close()
        if kind is not None and not keep:
            shutil.rmtree(self.folder, ignore_errors=True)


def writer_folder(path: Path) -> Path:
    """The folder in which the token file `path` is made."""
    return path.with_name(f".{path.name}.part")


def finished_header(tokenizer: Tokenizer, digest: Any, **fields: Any) -> TokenFileHeader:
    """The header of a token file with these fields; `digest` is the SHA-256 of everything after it,
    and includes the header then.
    """
    header = TokenFileHeader(
        version=VERSION,
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        sha256="",
        **fields,
    )
    digest.update(header.fields_json())
    return header.model_copy(update={"sha256": digest.hexdigest()})
