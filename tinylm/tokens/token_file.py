"""The token file: the tokens of many documents in one file on disk, read as a memory map.

    offset 0      magic line and header (JSON, padded with spaces)              4096 bytes
    4096          N tokens, uint16 or uint32, little-endian                     tokens (N,)
                  zeros to a multiple of 8 bytes
                  where each of the D documents ends, EOS included, uint64      document_ends (D,)

`TokenFile` reads it, token_file_writer.py writes it, id_arrays.py reads the arrays of other
programs as if they were token files. Knows nothing of where text comes from.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tinylm.common.errors import UserError
from tinylm.common.files import open_regular, reading
from tinylm.tokenizer.base import Tokenizer

# Bytes or tokens that are processed at a time.
BLOCK = 2**20
MAGIC = b"tinylm token file\n"
HEADER_BYTES = 4096
VERSION = 2
END_BYTES = 8
ENCODE = "python -m tinylm encode --data TEXT --tokenizer TOKENIZER --out"


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id: two bytes up to 65536 tokens, else four;
    little-endian on every machine.

    >>> token_dtype(65536).name, token_dtype(65537).name
    ('uint16', 'uint32')
    """
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def checked_tokens(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """`ids` in the type of a token file.

    Raises:
        ValueError: an id is outside the vocabulary; numpy would wrap it silently.
    """
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(
            f"token ids from {ids.min()} to {ids.max()} are outside the vocabulary of {vocab_size}"
        )
    return ids.astype(token_dtype(vocab_size), copy=False)


class TokenFileHeader(BaseModel):
    """The header of a token file."""

    # A later version may add keys.
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    version: Literal[2]
    count: int = Field(ge=1)
    """tokens, with every EOS"""
    dtype: Literal["uint16", "uint32"]
    tokenizer: str
    """fingerprint of the tokenizer"""
    vocab_size: int = Field(ge=1)
    eos_id: int = Field(ge=0)
    documents: int = Field(ge=1)
    text_bytes: int = Field(ge=0)
    """UTF-8 bytes of the text of the tokens"""
    spelled_eos: int = Field(default=0, ge=0)
    """documents whose text contains the name of the end-of-text token as characters"""
    end_marks: dict[str, int] = Field(default={})
    """end marks of other tokenizers, and how many documents contain each as characters"""
    unseparated: bool = False
    """whether a separator was given that does not occur in the text"""
    source: str
    """fingerprint of the text that was encoded"""
    recipe: str
    """fingerprint of everything the tokens depend on: text, tokenizer and settings"""
    sha256: str
    """of everything after the header, then of the other fields of the header"""

    def fields_json(self) -> bytes:
        """The fields that `sha256` covers; without defaults,
        so that files from before a field have the same digest.
        """
        return json.dumps(
            self.model_dump(exclude={"sha256"}, exclude_defaults=True), sort_keys=True
        ).encode()

    @property
    def index_offset(self) -> int:
        """The byte at which the ends of the documents start."""
        stop = HEADER_BYTES + self.count * np.dtype(self.dtype).itemsize
        return stop + -stop % END_BYTES


class TokenFile:
    """The tokens of many documents, each closed by EOS; the part that is used is read from disk.

    `tokens` is (N,), read-only. Pickled it is only its path: a worker process opens it again.

    Args:
        path: the file.
        header: its header, or one made for an array without.
        fix: what an error tells the user to do about the file.
        part: first token and the one after the last, if it is not the whole file.
        offset: byte at which the tokens start.
        ends: where the documents end, (D,) uint64, for a file without an index of its own.
    """

    def __init__(
        self,
        path: Path,
        header: TokenFileHeader,
        fix: str,
        part: tuple[int, int] | None = None,
        offset: int = HEADER_BYTES,
        ends: np.ndarray | None = None,
    ):
        self.path = path
        self.header = header
        self.fix = fix
        self.part = part
        self._offset = offset
        self._ends = ends
        start, stop = part or (0, header.count)
        dtype = np.dtype(header.dtype).newbyteorder("<")
        begin = offset + start * dtype.itemsize
        self._end = offset + stop * dtype.itemsize
        self.tokens = np.memmap(path, dtype=dtype, mode="r", offset=begin, shape=(stop - start,))

    @classmethod
    def open(cls, path: str | Path, fix: str | None = None) -> "TokenFile":
        """Open a token file of ours, and check its header and size.

        Args:
            path: the file.
            fix: what an error tells the user to do; by default, to encode again.

        Raises:
            UserError: it is not a token file, or not complete.
        """
        path = Path(path)
        bare = "" if fix else ". If it is a bare array of ids, set data.token_dtype"
        fix = fix or f"Encode again: {ENCODE} {path}"
        with reading(path), open_regular(path) as file:
            head = file.read(HEADER_BYTES)
            found = os.path.getsize(path)
        if not head.startswith(MAGIC):
            problem = f"not a token file: it begins with {head[:16]!r}"
            raise UserError(path, problem, f"{fix}{bare}")
        try:
            header = TokenFileHeader.model_validate_json(head[len(MAGIC) :])
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "JSON"
            raise UserError((path, "header", key), first["msg"], fix) from None
        size = header.index_offset + header.documents * END_BYTES
        if found != size:
            expected = (
                f"{size} bytes ({header.count} tokens of {header.dtype} after "
                f"{HEADER_BYTES} bytes of header, and {header.documents} ends of documents)"
            )
            raise UserError(path, f"expected {expected}, found {found}", fix)
        return cls(path, header, fix)

    def __len__(self) -> int:
        return len(self.tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenFile, (self.path, self.header, self.fix, self.part, self._offset, self._ends)

    def require_whole(self) -> None:
        """Raise a UserError if the file has become shorter since it was opened: to read a mapped
        file beyond its end kills the process (SIGBUS). A file that was removed stays readable.
        """
        try:
            found = os.stat(self.path).st_size
        except FileNotFoundError:
            return
        if found < self._end:
            problem = f"has become shorter while it is in use: {found} of {self._end} bytes"
            raise UserError(self.path, problem, self.fix)

    @property
    def document_ends(self) -> np.ndarray:
        """(D,) uint64: for each document that ends in `tokens`, where the next one starts."""
        ends = self._ends
        if ends is None:
            ends = np.memmap(
                self.path,
                dtype="<u8",
                mode="r",
                offset=self.header.index_offset,
                shape=(self.header.documents,),
            )
        if self.part is None:
            return ends
        # A number of another type would make searchsorted convert the whole index.
        first, last = np.searchsorted(ends, np.array(self.part, dtype=ends.dtype), side="right")
        return ends[first:last] - ends.dtype.type(self.part[0])

    def documents(self, dtype: np.dtype) -> Iterator[np.ndarray]:
        """The tokens, as `dtype`, of each document that has more than EOS."""
        tokens = np.asarray(self.tokens)  # a slice of a memory map takes several times as long
        ends = self.document_ends
        start = 0
        for block in range(0, len(ends), BLOCK):
            borders = [start, *ends[block : block + BLOCK].tolist()]
            for first, last in pairwise(borders):
                if last > first + 1:
                    yield tokens[first:last].astype(dtype, copy=False)
            start = borders[-1]

    @property
    def fingerprint(self) -> str:
        """12 hex digits that identify the tokens; `verify` checks that the file still has them."""
        if self.part is None:
            return self.header.sha256[:12]
        return hashlib.sha256(f"{self.header.sha256} {self.part}".encode()).hexdigest()[:12]

    def verify(self) -> None:
        """Read the whole file; UserError if a single bit has changed since it was written."""
        if self._ends is not None:
            return  # an array has no checksum; it was read whole when it was opened
        digest = hashlib.sha256()
        with reading(self.path), open_regular(self.path) as file:
            file.seek(HEADER_BYTES)
            for block in iter(partial(file.read, BLOCK), b""):
                digest.update(block)
        digest.update(self.header.fields_json())
        if digest.hexdigest() != self.header.sha256:
            problem = "damaged: its content is not what was written (checksum)"
            raise UserError(self.path, problem, self.fix)

    def require_tokenizer(self, tokenizer: Tokenizer) -> None:
        """UserError if the tokens were encoded with another tokenizer."""
        if self.header.tokenizer == tokenizer.fingerprint:
            return
        raise UserError(
            self.path,
            f"encoded with tokenizer {self.header.tokenizer} (vocabulary "
            f"{self.header.vocab_size}), this run uses {tokenizer.fingerprint} "
            f"({tokenizer.vocab_size})",
            f"Set tokenizer to that one, or: {self.fix}",
        )

    def between(self, start: int, stop: int) -> "TokenFile":
        """The tokens from `start` to before `stop` of the whole file, as a token file."""
        return TokenFile(self.path, self.header, self.fix, (start, stop), self._offset, self._ends)

    def document_border(self, wanted: int) -> int:
        """The first start of a document at or after `wanted`, or else the last one before it.

        Raises:
            UserError: there is only one document.
        """
        inner = self.document_ends[:-1]
        if not len(inner):
            problem = "has only one document, so none can be held out"
            raise UserError(self.path, problem, "Set data.val_dataset to a second token file")
        place = int(np.searchsorted(inner, np.uint64(wanted)))
        return int(inner[min(place, len(inner) - 1)])


@dataclass(frozen=True)
class JoinedFiles:
    """Token files one after the other, read as if they were one: `tokens` is sliced,
    and only the slice is read.

    So each source of a mixture has the share of val_loss that it has of the validation tokens,
    whatever its weight.
    """

    files: tuple[TokenFile, ...]

    def __len__(self) -> int:
        return sum(len(file) for file in self.files)

    def require_whole(self) -> None:
        """As `TokenFile.require_whole`, for all of them."""
        for file in self.files:
            file.require_whole()

    @property
    def tokens(self) -> "JoinedFiles":
        """The tokens of all of them, to be sliced: this object itself."""
        return self

    def __getitem__(self, places: slice) -> np.ndarray:
        """The tokens at these places, (n,)."""
        start, stop, step = places.indices(len(self))
        if step != 1:
            raise ValueError(f"joined tokens have no steps, got a step of {step}")
        slices = []
        first = 0
        for file in self.files:
            slices.append(file.tokens[max(start - first, 0) : max(stop - first, 0)])
            first += len(file)
        return np.concatenate(slices)

    @property
    def fingerprint(self) -> str:
        """12 hex digits that identify the tokens."""
        names = " ".join(file.fingerprint for file in self.files)
        return hashlib.sha256(names.encode()).hexdigest()[:12]
