"""The token file: the tokens of many documents behind each other, on disk, read as a memory map.

    Draft              tokens and ends of documents, a portion at a time, also after an interruption  ─▶ one file
    TokenFile          the file ─▶ tokens (N,) and document_ends (D,), read from disk where they are touched

The file is a line that says what it is; the header as JSON, filled up with spaces and ended by a newline to 4096 bytes;
the tokens, raw and little-endian; zeros to a multiple of 8 bytes; then for each document where it ends, EOS included, as
uint64. Other programs' arrays of ids are read too: `.npy`, bare numbers in a `.bin` where the settings say their type, and
datatrove's `.ds` with its index and metadata beside it.
This file knows nothing of where text comes from.
"""

import hashlib
import io
import json
import os
import re
import tokenize
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tinylm.common.errors import UserError, printable, reading, require_regular
from tinylm.text.sources import DATATROVE, NPY
from tinylm.tokenizer.base import Tokenizer

# Bytes or tokens that are looked at together.
BLOCK = 2**20
# Documents whose hashes are worked out together.
DIGESTS = 2**16
MAGIC = b"tinylm token file\n"
HEADER_BYTES = 4096
VERSION = 2
END_BYTES = 8
ENCODE = "python -m tinylm encode --data TEXT --tokenizer TOKENIZER --out"


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id: two bytes up to 65536 tokens, else four; little-endian on every machine.

    >>> token_dtype(65536).name, token_dtype(65537).name
    ('uint16', 'uint32')
    """
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def checked_tokens(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """`ids` in the type of a token file; ValueError for an id outside the vocabulary, which numpy would wrap silently."""
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(
            f"token ids from {ids.min()} to {ids.max()} are outside the vocabulary of {vocab_size}"
        )
    return ids.astype(token_dtype(vocab_size), copy=False)


class TokenFileHeader(BaseModel):
    """What a token file says of itself."""

    # A later version may add keys.
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    version: Literal[2]
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
    spelled_eos: int = Field(default=0, ge=0)
    """documents whose text has the tokenizer's end of text in characters"""
    unseparated: bool = False
    """whether a separator was given that the text does not have"""
    source: str
    """fingerprint of the text that was encoded"""
    recipe: str
    """fingerprint of everything that the tokens depend on: text, tokenizer and settings"""
    sha256: str
    """over everything behind the header and then the other fields of this header"""

    def fields_json(self) -> bytes:
        """The fields that `sha256` covers beside the tokens; without those that older files lack, where they say nothing."""
        return json.dumps(
            self.model_dump(exclude={"sha256"}, exclude_defaults=True), sort_keys=True
        ).encode()

    @property
    def token_dtype(self) -> np.dtype:
        """The type of the tokens as they stand in the file."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def index_offset(self) -> int:
        """Where the ends of the documents begin."""
        stop = HEADER_BYTES + self.count * self.token_dtype.itemsize
        return stop + -stop % END_BYTES

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.index_offset + self.documents * END_BYTES


class TokenFile:
    """The tokens of many documents, each closed by EOS, read from disk where they are touched.

    `tokens` is (N,), read-only. A pickled TokenFile is its path: a worker process opens it again. `mend` is what an error
    tells the user to do: a file of the cache is made again, one that the user gave is not.

    Args:
        part: from which to before which token, where it is not the whole file.
        offset: where the tokens begin.
        ends: where the documents end, (D,) uint64, for a file that has no index of its own.
    """

    def __init__(
        self,
        path: Path,
        header: TokenFileHeader,
        mend: str,
        part: tuple[int, int] | None = None,
        offset: int = HEADER_BYTES,
        ends: np.ndarray | None = None,
    ):
        self.path, self.header, self.mend, self.part, self._offset, self._ends = (
            path,
            header,
            mend,
            part,
            offset,
            ends,
        )
        start, stop = part or (0, header.count)
        dtype = header.token_dtype
        self.tokens = np.memmap(
            path,
            dtype=dtype,
            mode="r",
            offset=offset + start * dtype.itemsize,
            shape=(stop - start,),
        )

    @classmethod
    def open(
        cls,
        path: str | Path,
        mend: str | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        dtype: str | None = None,
    ) -> "TokenFile":
        """The token file at `path`, its header and size checked.

        Args:
            path: a token file of ours, or an array of ids, .npy, datatrove's .ds, or bare.
            mend: what to do about a file that is no good; by default, to encode again.
            tokenizer: what an array of ids was encoded with; its EOS closes the documents. Such a file is read once, whole.
            dtype: type of the numbers of a bare array, `uint16` or `uint32`.

        Raises:
            UserError: it is not a token file, or not all of it; or an id of an array is none of the tokenizer's.
        """
        path, bare = (
            Path(path),
            "" if mend else " If it is a bare array of ids, set data.token_dtype.",
        )
        mend = mend or f"Encode again: {ENCODE} {printable(path)}."
        require_regular(path)
        with reading(path):
            with open(path, "rb") as file:
                head = file.read(HEADER_BYTES)
            found = os.path.getsize(path)
        if path.suffix == NPY:
            return _with_scan(path, *_npy_layout(path, head, found, mend), tokenizer, mend)
        if path.suffix == DATATROVE:
            return _with_scan(
                path, *_datatrove_layout(path, found), tokenizer, mend, _datatrove_ends(path)
            )
        if dtype is not None and not head.startswith(MAGIC):
            return _with_scan(path, *_bare_layout(path, dtype, found), tokenizer, mend)
        if not head.startswith(MAGIC):
            raise UserError(
                f"{printable(path)}: not a token file: it begins with {head[:16]!r}. {mend}{bare}"
            )
        header = _parse_header(path, head, mend)
        if dtype is not None and header.dtype != dtype:
            raise UserError(
                f"data.token_dtype: {dtype}, and {printable(path)} says itself that it holds {header.dtype}. Take data.token_dtype out."
            )
        if found != header.size:
            held = f"{header.count} tokens of {header.dtype} behind {HEADER_BYTES} bytes of header, and {header.documents} ends of documents"
            raise UserError(
                f"{printable(path)}: expected {header.size} bytes ({held}), found {found}. {mend}"
            )
        return cls(path, header, mend)

    def __len__(self) -> int:
        return len(self.tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenFile, (self.path, self.header, self.mend, self.part, self._offset, self._ends)

    @property
    def document_ends(self) -> np.ndarray:
        """(D,) uint64: for each document that ends in `tokens`, where the next one begins; read from disk if it is the whole file."""
        ends, start = self._ends_in_file()
        return ends if self.part is None else ends - ends.dtype.type(start)

    def _ends_in_file(self) -> tuple[np.ndarray, int]:
        """`document_ends` counted from the start of the whole file, read from disk, and where `tokens` begin there."""
        ends = self._all_ends()
        if self.part is None:
            return ends, 0
        # A number of another type would make searchsorted convert the whole index.
        first, last = np.searchsorted(ends, np.array(self.part, dtype=ends.dtype), side="right")
        return ends[first:last], self.part[0]

    def document_digests(self, dtype: np.dtype) -> Iterator[np.ndarray]:
        """A hash of the tokens, as `dtype`, of each document that has more than EOS: uint64, so many documents at a time."""
        tokens = np.asarray(self.tokens)  # a slice of a memory map takes several times as long
        ends, first = self._ends_in_file()
        start = 0
        for block in range(0, len(ends), DIGESTS):
            stops = [end - first for end in ends[block : block + DIGESTS].tolist()]
            documents = (
                tokens[a:b].astype(dtype, copy=False)
                for a, b in zip([start, *stops], stops, strict=False)
                if b > a + 1
            )
            yield np.frombuffer(
                b"".join(
                    hashlib.blake2b(document, digest_size=8).digest() for document in documents
                ),
                dtype="<u8",
            )
            start = stops[-1]

    def _all_ends(self) -> np.ndarray:
        if self._ends is not None:
            return self._ends
        return np.memmap(
            self.path,
            dtype="<u8",
            mode="r",
            offset=self.header.index_offset,
            shape=(self.header.documents,),
        )

    @property
    def fingerprint(self) -> str:
        """12 hex digits that identify the tokens; `verify` says whether the file still has them."""
        if self.part is None:
            return self.header.sha256[:12]
        return hashlib.sha256(f"{self.header.sha256} {self.part}".encode()).hexdigest()[:12]

    def verify(self) -> None:
        """Read the whole file; UserError where a single bit of it has changed since it was written."""
        if (
            self._ends is not None
        ):  # an array says nothing of its content; `open` has just read all of it
            return
        digest = hashlib.sha256()
        with reading(self.path), open(self.path, "rb") as file:
            file.seek(HEADER_BYTES)
            for block in iter(partial(file.read, BLOCK), b""):
                digest.update(block)
        digest.update(self.header.fields_json())
        if digest.hexdigest() != self.header.sha256:
            raise UserError(
                f"{printable(self.path)}: its content is not what was written (checksum). {self.mend}"
            )

    def require_tokenizer(self, tokenizer: Tokenizer) -> None:
        """UserError where the tokens are those of another tokenizer."""
        if self.header.tokenizer != tokenizer.fingerprint:
            made = f"{printable(self.path)} was encoded with tokenizer {self.header.tokenizer} (vocabulary {self.header.vocab_size})"
            raise UserError(
                f"{made}, this run uses {tokenizer.fingerprint} ({tokenizer.vocab_size}). Set tokenizer to that one, or: {self.mend}"
            )

    def between(self, start: int, stop: int) -> "TokenFile":
        """The tokens from `start` to before `stop` of the whole file, as a token file."""
        return TokenFile(self.path, self.header, self.mend, (start, stop), self._offset, self._ends)

    def document_border(self, wanted: int) -> int:
        """The first start of a document at or behind `wanted`, or else the last one before it.

        Raises:
            UserError: there is one document only.
        """
        inner = self.document_ends[:-1]
        if not len(inner):
            raise UserError(
                f"{printable(self.path)}: one document only, so none can be held out. Set data.val_dataset to a second token file."
            )
        return int(inner[min(int(np.searchsorted(inner, np.uint64(wanted))), len(inner) - 1)])


def _parse_header(path: Path, head: bytes, mend: str) -> TokenFileHeader:
    try:
        return TokenFileHeader.model_validate_json(head[len(MAGIC) :])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "JSON"
        raise UserError(
            f"{printable(path)}: header: {printable(key)}: {printable(first['msg'])}. {mend}"
        ) from None


class Shared(NamedTuple):
    """How many different documents validate, and how many of them are training documents too."""

    found: int
    of: int


def shared_documents(train: Sequence[TokenFile], val: Sequence[TokenFile]) -> Shared:
    """Which documents of token files of one tokenizer are on both sides, told by their tokens.

    Memory holds 8 bytes a validation document, and a block of the others.
    """
    dtype = np.result_type(*(file.header.token_dtype for file in (*train, *val)))
    wanted = np.unique(
        np.concatenate(
            [np.empty(0, "<u8"), *chain.from_iterable(file.document_digests(dtype) for file in val)]
        )
    )
    found = np.zeros(len(wanted), dtype=bool)
    for digests in (
        chain.from_iterable(file.document_digests(dtype) for file in train) if len(wanted) else ()
    ):
        places = np.searchsorted(wanted, digests) % len(
            wanted
        )  # behind the last one: any other place, where it is not
        found[places[wanted[places] == digests]] = True
    return Shared(int(found.sum()), len(wanted))


def _bare_layout(path: Path, dtype: str, size: int) -> tuple[str, int, int]:
    """dtype, offset and number of ids of a bare array."""
    itemsize = np.dtype(dtype).itemsize
    if not size or size % itemsize:
        expected = f"expected a multiple of {itemsize} bytes, since data.token_dtype is {dtype}"
        raise UserError(
            f"{printable(path)}: {expected}, found {size}. Give the whole file, or correct data.token_dtype."
        )
    return dtype, 0, size // itemsize


def _npy_layout(path: Path, head: bytes, size: int, mend: str) -> tuple[str, int, int]:
    """dtype, offset and number of ids of a NumPy file; what is not a plain array of ids is refused before any of it is read."""
    file = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(file)
        if version != (
            1,
            0,
        ):  # np.save writes later ones only for names and types that ids do not need
            raise ValueError(f"format {version[0]}.{version[1]}")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except (ValueError, SyntaxError, tokenize.TokenError, RecursionError) as error:
        raise UserError(
            f"{printable(path)}: not a NumPy file of token ids: {printable(str(error).partition(chr(10))[0])[:200]}. {mend}"
        ) from None
    if len(shape) != 1 or dtype not in (np.dtype("<u2"), np.dtype("<u4")):
        found = f"found {printable(dtype.str)} of shape {shape}"
        raise UserError(
            f"{printable(path)}: expected one row of uint16 or uint32, {found}. Save the ids so with np.save."
        )
    expected = file.tell() + shape[0] * dtype.itemsize
    if size != expected or not shape[0]:
        raise UserError(
            f"{printable(path)}: expected {expected} bytes for {shape[0]} ids of {dtype.name}, and at least one id, found {size}. {mend}"
        )
    return dtype.name, file.tell(), shape[0]


def _datatrove_layout(path: Path, size: int) -> tuple[str, int, int]:
    """dtype, offset and number of ids of datatrove's NAME.ds, as NAME.ds.metadata says them below the name of the tokenizer."""
    metadata = _beside(path, ".metadata")
    with reading(metadata), open(metadata, "rb") as file:
        head = file.read(HEADER_BYTES)
    said = re.match(rb"[^\n]*\|([24])\n([1-9][0-9]{0,15})(\n|$)", head)
    if not said:
        raise UserError(
            f"{printable(metadata)}: expected a name with |2 or |4 behind it, then the number of tokens, found {head[:80]!r}. {_DATATROVE_AGAIN}"
        )
    width, count = int(said[1]), int(said[2])
    if size != width * count:
        raise UserError(
            f"{printable(path)}: expected {width * count} bytes ({count} tokens of {width} bytes), found {size}. {_DATATROVE_AGAIN}"
        )
    return ("uint16" if width == 2 else "uint32"), 0, count


def _datatrove_ends(path: Path) -> np.ndarray:
    """Where each document ends, from NAME.ds.index."""
    index = _beside(path, ".index")
    size = os.path.getsize(index)
    if not size or size % END_BYTES:
        raise UserError(
            f"{printable(index)}: expected {END_BYTES} bytes for each of at least one document, found {size}. {_DATATROVE_AGAIN}"
        )
    return np.memmap(index, dtype="<u8", mode="r")


_DATATROVE_AGAIN = "Run the task of datatrove again that wrote it."


def _beside(path: Path, suffix: str) -> Path:
    beside = path.with_name(f"{path.name}{suffix}")
    if not os.path.lexists(beside):
        raise UserError(
            f"{printable(beside)}: not found. Keep it beside {printable(path.name)}: datatrove writes .ds, .ds.index and .ds.metadata."
        )
    require_regular(beside)
    return beside


def _check_ends(path: Path, ends: np.ndarray, closed: np.ndarray, count: int) -> None:
    """UserError unless the documents of an index fill the file, and each ends behind an EOS; `closed` are the places behind one."""
    if ends[-1] != count or not ends[0] or (ends[:-1] >= ends[1:]).any():
        raise UserError(
            f"{printable(path)}: its index is not that of {count} tokens in {len(ends)} documents. {_DATATROVE_AGAIN}"
        )
    other = np.flatnonzero(~np.isin(ends, closed.astype(ends.dtype), assume_unique=True))
    if len(other):
        told = f"{len(other)} of {len(ends)} documents, the first of them number {other[0] + 1}, do not end with the tokenizer's end of text"
        raise UserError(
            f"{printable(path)}: {told}. Set tokenizer to the one that encoded it, or encode with its eos_token and shuffle no chunks."
        )


def _with_scan(
    path: Path,
    dtype: str,
    offset: int,
    count: int,
    tokenizer: Tokenizer | None,
    mend: str,
    ends: np.ndarray | None = None,
) -> TokenFile:
    """An array of ids as a token file: read once, in blocks, for what our own files say in header and index.

    Raises:
        UserError: an id is none of the tokenizer's, or `ends` are not where documents end.
    """
    if tokenizer is None:
        raise ValueError(f"{path}: an array of ids is opened with the tokenizer it was made with")
    tokens = np.memmap(
        path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r", offset=offset, shape=(count,)
    )
    tally, found = _Tally(tokenizer), []
    for start in range(0, count, BLOCK):
        block = tokens[start : start + BLOCK]
        if int(block.max()) >= tokenizer.vocab_size:
            place = start + int(np.argmax(block >= tokenizer.vocab_size))
            told = f"id {tokens[place]} at position {place}, and the tokenizer of this run has {tokenizer.vocab_size} tokens"
            raise UserError(
                f"{printable(path)}: {told}. Set tokenizer to the one that it was encoded with, or correct data.token_dtype."
            )
        tally.add_tokens(block)
        found.append(start + 1 + np.flatnonzero(block == tokenizer.eos_id))
    if ends is not None:
        _check_ends(path, ends, np.concatenate(found), count)
    else:
        ends = np.concatenate([*found, [count]]).astype("<u8")
        ends = (
            ends[:-1] if len(ends) > 1 and ends[-2] == count else ends
        )  # or else the last document is not closed
    return TokenFile(
        path, tally.header(dtype, count, len(ends), "", ""), mend, offset=offset, ends=ends
    )


class _Tally:
    """What the header says of the tokens, gathered while they pass."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.dtype = tokenizer, token_dtype(tokenizer.vocab_size)
        self.digest = hashlib.sha256()
        self.text_bytes = 0
        self._lengths = np.array(tokenizer.byte_lengths(), dtype=np.uint32)

    def add_tokens(self, tokens: np.ndarray) -> None:
        self.digest.update(tokens.data)
        self.text_bytes += int(self._lengths[tokens].sum(dtype=np.int64))

    def header(
        self, dtype: str, count: int, documents: int, source: str, recipe: str, **text: Any
    ) -> TokenFileHeader:
        """The header of a file whose every byte went through the digest; `text` are the fields with a default."""
        tokenizer = self.tokenizer
        header = TokenFileHeader(
            version=VERSION, count=count, dtype=dtype, tokenizer=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id, documents=documents, text_bytes=self.text_bytes, source=source, recipe=recipe, sha256="", **text,
        )  # fmt: skip
        self.digest.update(header.fields_json())
        return header.model_copy(update={"sha256": self.digest.hexdigest()})
