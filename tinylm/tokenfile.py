"""The token file: the tokens of many documents behind each other, on disk, read as a memory map.

    write_token_file   documents (n + 1,), each closed by EOS  ─▶ one file with a header that says what it holds
    TokenFile          the file ─▶ tokens (N,), read from disk where they are touched

The file is a line that says what it is; the header as JSON, filled up with spaces and ended by a newline to 4096 bytes;
then the tokens, raw and little-endian. This file knows nothing of where text comes from.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tinylm.errors import UserError, printable, reading, reason, require_regular
from tinylm.tokenizer import Tokenizer

BIN = ".bin"
# Bytes or tokens that are looked at together.
BLOCK = 2**20
MAGIC = b"tinylm token file\n"
HEADER_BYTES = 4096
VERSION = 1


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id: two bytes up to 65536 tokens, else four; little-endian on every machine.

    >>> token_dtype(65536).name, token_dtype(65537).name
    ('uint16', 'uint32')
    """
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def checked_tokens(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """`ids` in the type of a token file; ValueError for an id outside the vocabulary, which numpy would wrap silently."""
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(f"token ids from {ids.min()} to {ids.max()} are outside the vocabulary of {vocab_size}")
    return ids.astype(token_dtype(vocab_size), copy=False)


class TokenFileHeader(BaseModel):
    """What a token file says of itself."""

    # A later version may add keys.
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    version: Literal[1]
    count: int = Field(ge=1)
    """tokens, every EOS included"""
    dtype: Literal["uint16", "uint32"]
    tokenizer: str
    """fingerprint of the tokenizer"""
    vocab_size: int = Field(ge=1)
    eos_id: int = Field(ge=0)
    documents: int = Field(ge=1)
    text_bytes: int = Field(ge=0)
    """UTF-8 bytes of text that the tokens stand for"""
    source: str
    """fingerprint of what was encoded"""
    sha256: str
    """over the tokens and then the other fields of this header"""

    def fields_json(self) -> bytes:
        """The fields that `sha256` covers beside the tokens."""
        return json.dumps(self.model_dump(exclude={"sha256"}), sort_keys=True).encode()


def is_token_file(name: str) -> bool:
    """Whether a dataset's name is that of a token file; `TokenFile.open` says whether it is a good one."""
    return name.endswith(BIN)


class TokenFile:
    """The tokens of many documents, each closed by EOS, read from disk where they are touched.

    `tokens` is (N,), read-only. A pickled TokenFile is its path: a worker process opens it again. `mend` is what an error
    tells the user to do: a file of the cache is made again, one that the user gave is not.
    """

    def __init__(self, path: Path, header: TokenFileHeader, mend: str, part: tuple[int, int] | None = None):
        self.path, self.header, self.mend, self.part = path, header, mend, part
        start, stop = part or (0, header.count)
        dtype = np.dtype(header.dtype).newbyteorder("<")
        self.tokens = np.memmap(path, dtype=dtype, mode="r", offset=HEADER_BYTES + start * dtype.itemsize, shape=(stop - start,))

    @classmethod
    def open(cls, path: str | Path, mend: str | None = None) -> "TokenFile":
        """The token file at `path`, its header and size checked.

        Raises:
            UserError: it is not a token file, or not all of it.
        """
        path, mend = Path(path), mend or "Give the text that it was made from as data.dataset."
        require_regular(path)
        with reading(path):
            with open(path, "rb") as file:
                head = file.read(HEADER_BYTES)
            found = os.path.getsize(path)
        header = _parse_header(path, head, mend)
        size = HEADER_BYTES + header.count * np.dtype(header.dtype).itemsize
        if found != size:
            expected = f"expected {size} bytes ({header.count} tokens of {header.dtype} behind {HEADER_BYTES} bytes of header)"
            raise UserError(f"{printable(path)}: {expected}, found {found}. {mend}")
        return cls(path, header, mend)

    def __len__(self) -> int:
        return len(self.tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenFile, (self.path, self.header, self.mend, self.part)

    @property
    def fingerprint(self) -> str:
        """12 hex digits that identify the tokens; `verify` says whether the file still has them."""
        if self.part is None:
            return self.header.sha256[:12]
        return hashlib.sha256(f"{self.header.sha256} {self.part}".encode()).hexdigest()[:12]

    def verify(self) -> None:
        """Read the whole file; UserError where a single bit of it has changed since it was written."""
        digest = hashlib.sha256()
        with reading(self.path), open(self.path, "rb") as file:
            file.seek(HEADER_BYTES)
            for block in iter(partial(file.read, BLOCK), b""):
                digest.update(block)
        digest.update(self.header.fields_json())
        if digest.hexdigest() != self.header.sha256:
            raise UserError(f"{printable(self.path)}: its content is not what was written (checksum). {self.mend}")

    def require_tokenizer(self, tokenizer: Tokenizer) -> None:
        """UserError where the tokens are those of another tokenizer."""
        if self.header.tokenizer != tokenizer.fingerprint:
            made = f"{printable(self.path)} was encoded with tokenizer {self.header.tokenizer}"
            raise UserError(f"{made}, this run uses {tokenizer.fingerprint}. Set tokenizer to that one, or: {self.mend}")

    def between(self, start: int, stop: int) -> "TokenFile":
        """The tokens from `start` to before `stop` of the whole file, as a token file."""
        return TokenFile(self.path, self.header, self.mend, (start, stop))


def _parse_header(path: Path, head: bytes, mend: str) -> TokenFileHeader:
    if not head.startswith(MAGIC):
        raise UserError(f"{printable(path)}: not a token file: it begins with {head[:16]!r}. {mend}")
    try:
        return TokenFileHeader.model_validate_json(head[len(MAGIC) :])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "JSON"
        raise UserError(f"{printable(path)}: header: {printable(key)}: {printable(first['msg'])}. {mend}") from None


def write_token_file(path: Path, documents: Iterable[np.ndarray], tokenizer: Tokenizer, *, source: str, progress: Callable[[int], None] | None = None) -> None:
    """Write the tokens of `documents`, arrays that end with EOS, as the token file `path`, whole or not at all.

    The file is made beside its name, synced, renamed, and the folder synced. A second writer waits for the first.

    Args:
        path: where the file goes; one that is there is replaced.
        documents: what `encode_documents` gives.
        tokenizer: what they were encoded with.
        source: fingerprint of the text.
        progress: called with the number of documents written so far.

    Raises:
        UserError: the disk is full, or the folder cannot be written; nothing is left behind.
    """
    with locked(path):
        write_locked(path, documents, tokenizer, source, progress)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Only one process of this machine makes `path` at a time; the lock dies with its process."""
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns errors of the operating system into UserErrors that name the file being made."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{printable(path)}: the token file could not be written: {reason(error)}. Make room, or choose another data.cache_dir.") from error


def write_locked(path: Path, documents: Iterable[np.ndarray], tokenizer: Tokenizer, source: str, progress: Callable[[int], None] | None) -> None:
    # Under the lock nobody else uses this name: what a killed process left is overwritten.
    temporary = path.with_name(f".{path.name}.tmp")
    tally = _Tally(tokenizer)
    try:
        with _writing(path):
            with open(temporary, "wb") as file:
                file.write(bytes(HEADER_BYTES))
                for tokens in documents:
                    tally.write(file, tokens)
                    if progress is not None:
                        progress(tally.documents)
                file.seek(0)
                file.write(tally.header(source))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


class _Tally:
    """What the header says of the tokens, gathered while they are written."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.documents = self.tokens = self.text_bytes = 0
        self._lengths = np.array(tokenizer.byte_lengths(), dtype=np.uint32)
        self._digest = hashlib.sha256()

    def write(self, file: BinaryIO, tokens: np.ndarray) -> None:
        """Write one document, in blocks: it may be very long."""
        self.documents += 1
        self.tokens += len(tokens)
        for start in range(0, len(tokens), BLOCK):
            block = checked_tokens(tokens[start : start + BLOCK], self.tokenizer.vocab_size)
            file.write(block.data)
            self._digest.update(block.data)
            self.text_bytes += int(self._lengths[block].sum())

    def header(self, source: str) -> bytes:
        """The first 4096 bytes of the file."""
        tokenizer = self.tokenizer
        header = TokenFileHeader(
            version=VERSION,
            count=self.tokens,
            dtype=token_dtype(tokenizer.vocab_size).name,
            tokenizer=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            documents=self.documents,
            text_bytes=self.text_bytes,
            source=source,
            sha256="",
        )
        self._digest.update(header.fields_json())
        header = header.model_copy(update={"sha256": self._digest.hexdigest()})
        return (MAGIC + header.model_dump_json().encode()).ljust(HEADER_BYTES - 1) + b"\n"


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
