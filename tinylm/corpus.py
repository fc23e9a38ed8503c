r"""Documents: where they come from, which are held out, and how they become a token file.

    1. source     .txt, .jsonl, .parquet (also .txt.gz, .jsonl.gz), a folder or glob of them, or a Hugging Face dataset
                                                        ─▶ str, one a document, in a fixed order       `find_source`
    2. split      training or validation, decided by the text of each document                          `train_documents`
    3. ids        (n + 1,) uint16 or uint32 a document: its n tokens, at most max_doc_len, then EOS     `encode_documents`
    4. file       all of them one after another, behind a header; read as a memory map (N,)             `TokenFile`

Text is UTF-8. A byte-order mark at the start of a file is dropped, and \r\n ends a line as \n does; every other character
stays as it is, NUL and U+2028 too. Blank documents are skipped. A row that is no document is an error that names its
file, line and key. Memory holds one document (or one batch of a parquet file) at a time, never a whole source.

Everything that reads documents asks here; packing them into rows is packing.py's work.
"""

import glob
import gzip
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn

import numpy as np
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tinylm.config import DataConfig
from tinylm.errors import UserError, printable
from tinylm.tokenizer import Tokenizer, first_line, hub_errors, is_hub_name, reject_lone_surrogates, require_hub

Which = Literal["train", "val"]

DOCUMENT_FILES = (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz")
BIN = ".bin"
# A line without end is a binary file or a device, not a document.
LINE_BYTES_LIMIT = 2**30
# Text is handed to the tokenizer in batches of so many documents or characters, whichever is first.
BATCH_DOCUMENTS, BATCH_CHARACTERS = 256, 1_000_000
PARQUET_BATCH_ROWS = 1024
# Bytes or tokens that are looked at together.
BLOCK = 2**20


# --- step 1: sources --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalFiles:
    """Document files on this machine, in the order they are read."""

    name: str
    paths: tuple[Path, ...]
    field: str
    separator: str | None

    def documents(self) -> Iterator[str]:
        """Every document that is not blank."""
        for path in self.paths:
            _check_regular(path)
            if path.name.endswith(".parquet"):
                yield from _parquet_documents(path, self.field)
            elif path.name.endswith((".jsonl", ".jsonl.gz")):
                yield from _jsonl_documents(path, self.field)
            elif self.separator is not None:
                yield from _separated_documents(path, self.separator)
            else:
                yield from (line for _, line in _text_lines(path) if not _blank(line))

    def fingerprint(self) -> str:
        """SHA-256 over the kinds and contents of the files, read in blocks."""
        digest = hashlib.sha256()
        for path in self.paths:
            _check_regular(path)
            with _mended(path), open(path, "rb") as file:
                digest.update(f"{_document_suffix(path.name)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the Hugging Face hub, downloaded whole or streamed."""

    name: str
    config: str | None
    split: str
    streaming: bool
    field: str

    def documents(self) -> Iterator[str]:
        """Every document that is not blank, in the order of the dataset."""
        for number, row in enumerate(self._rows(), start=1):
            try:
                text = _text_of(row, self.field)
            except _BadRow as problem:
                raise UserError(f"{self.name} ({self.split}): row {number}: {problem}") from None
            if not _blank(text):
                yield text

    def fingerprint(self) -> str:
        """SHA-256 over the name: what the hub stores under it is not read."""
        return hashlib.sha256(f"hub {self.name} {self.config} {self.split}".encode()).hexdigest()

    def _rows(self) -> Iterator[Any]:
        dataset = self._load()
        try:
            yield from dataset
        except hub_errors() as error:
            raise UserError(f"{self.name} ({self.split}): reading stopped: {first_line(error)}. Try again: a run resumes where it stopped.") from error

    def _load(self) -> Iterable[Any]:
        """The library's dataset, with the text column alone where it says which columns there are."""
        mend = "Give a local file or folder as data.dataset."
        require_hub(f"data.dataset: {self.name}", mend)
        datasets = _import("datasets", self.name)
        try:
            dataset = datasets.load_dataset(self.name, self.config, split=self.split, streaming=self.streaming)
        except (*hub_errors(), ValueError, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"data.dataset: {self.name}: {first_line(error)}. Check data.dataset_config and data.split, or: {mend}") from error
        columns = dataset.column_names
        if columns is None:
            return dataset
        if self.field not in columns:
            raise UserError(f"{self.name} ({self.split}): {_no_column(self.field, columns)}")
        return dataset.select_columns([self.field])


Source = LocalFiles | HubDataset


def find_source(data: DataConfig, key: str, name: str, split: str) -> Source:
    """What `name`, the value of the setting data.`key`, means: files that are here, or else a dataset on the hub.

    data.dataset_config belongs to data.dataset: a val_dataset on the hub is read in its default configuration.

    Raises:
        UserError: it is a path and nothing is there, or nothing there is a document file.
    """
    if os.path.lexists(name) or glob.has_magic(name):
        if key == "dataset" and (data.dataset_config is not None or data.split != "train" or data.val_split is not None):
            raise UserError(f"data.dataset: {printable(name)} is on this machine, where files have no splits. Take split, val_split and dataset_config out.")
        return LocalFiles(name, _find_files(name, key), data.text_field, data.document_separator)
    if not is_hub_name(name) or "/" not in name or _document_suffix(name) or name.endswith((BIN, ".json", ".csv")):
        raise UserError(f"data.{key}: {printable(name)}: not found. Give a file, a folder, a glob, or a Hugging Face name written owner/name.")
    return HubDataset(name, data.dataset_config if key == "dataset" else None, split, data.streaming, data.text_field)


def _find_files(name: str, key: str) -> tuple[Path, ...]:
    """The document files that a path or glob stands for, sorted; folders are searched to their bottom."""
    kinds = ", ".join(DOCUMENT_FILES)
    if os.path.isdir(name):
        found = [Path(folder, file) for folder, _, files in os.walk(name, onerror=_refuse_folder) for file in files if _document_suffix(file)]
        found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(name).parts)]
        place = "in this folder"
    elif os.path.lexists(name):
        _check_regular(Path(name))
        if not _document_suffix(name):
            raise UserError(f"data.{key}: {printable(name)}: not a kind of file with documents ({kinds}). Convert it, or name it by its kind.")
        return (Path(name),)
    else:
        found = [Path(path) for path in glob.glob(name, recursive=True) if _document_suffix(path) and not os.path.isdir(path)]
        place = "matches"
    if not found:
        raise UserError(f"data.{key}: {printable(name)}: no file of a kind with documents ({kinds}) {place}. Give the path of one.")
    return tuple(sorted(found))


def _refuse_folder(error: OSError) -> NoReturn:
    raise UserError(f"{printable(error.filename)}: {_reason(error)}. Give a folder that can be read.")


def _document_suffix(name: str) -> str | None:
    """Which of `DOCUMENT_FILES` a file name ends in."""
    return next((suffix for suffix in DOCUMENT_FILES if name.endswith(suffix)), None)


def _check_regular(path: Path) -> None:
    """Raise a UserError for what cannot be read to its end: nothing there, a pipe, a device, a circle of links."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise UserError(f"{printable(path)}: {_reason(error)}. Give the path of a file that can be read.") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{printable(path)}: not a regular file. Give the path of a file on disk.")


def _reason(error: OSError) -> str:
    return "not found" if isinstance(error, FileNotFoundError) else error.strerror or first_line(error)


@contextmanager
def _mended(path: Path) -> Iterator[None]:
    """Turns errors of the operating system and of gzip while `path` is read into UserErrors that name it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{printable(path)}: damaged or cut-off gzip data ({first_line(error)}). Download or compress it again.") from None
    except OSError as error:
        raise UserError(f"{printable(path)}: {_reason(error)}. Give a file that can be read.") from None


def _raw_lines(path: Path) -> Iterator[bytes]:
    """Lines as they stand in the file, ends included; cut at \\n alone."""
    with gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb") as file:
        for number, line in enumerate(iter(partial(file.readline, LINE_BYTES_LIMIT), b""), start=1):
            if len(line) == LINE_BYTES_LIMIT:
                raise UserError(f"{printable(path)}:{number}: a line of {LINE_BYTES_LIMIT} bytes and more. Is it text? Cut it into documents.")
            yield line


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The number of each line, from 1, and its text without its end."""
    offset = 0
    with _mended(path):
        for number, raw in enumerate(_raw_lines(path), start=1):
            line = raw[3:] if number == 1 and raw.startswith(b"\xef\xbb\xbf") else raw
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                at = offset + len(raw) - len(line) + error.start
                raise UserError(f"{printable(path)}:{number}: not UTF-8 text: byte 0x{line[error.start]:02x} at offset {at}. Save the file as UTF-8.") from None
            yield number, text.removesuffix("\n").removesuffix("\r")
            offset += len(raw)


def _blank(text: str) -> bool:
    return not text or text.isspace()


def _separated_documents(path: Path, separator: str) -> Iterator[str]:
    """The text between separators, without line ends around it."""
    separator = separator.replace("\r\n", "\n")  # as in the lines
    pending: list[str] = []
    held = 0
    for _, line in _text_lines(path):
        pending += (line, "\n")
        held += len(line) + 1
        if held > BATCH_CHARACTERS:
            *whole, rest = "".join(pending).split(separator)
            yield from _trimmed(whole)
            # A longer document is searched again when it has doubled, so that the work stays linear.
            pending, held = [rest], 0 if whole or len(rest) < BATCH_CHARACTERS else BATCH_CHARACTERS - len(rest)
    yield from _trimmed("".join(pending).split(separator))


def _trimmed(texts: Iterable[str]) -> Iterator[str]:
    return (text.strip("\n") for text in texts if not _blank(text))


class _BadRow(Exception):
    """What is wrong with a row; the reader adds where it stands."""


_JSON_NAMES = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object", type(None): "null", str: "a string"}


def _text_of(row: Any, field: str) -> str:
    """The document in a row."""
    mend = "Correct the row, or set data.text_field to the key that holds the text."
    if not isinstance(row, dict):
        raise _BadRow(f'expected an object such as {{"{printable(field)}": "..."}}, found {_kind_of(row)}. {mend}')
    if field not in row:
        raise _BadRow(f"{printable(field)}: missing; the row has {_some(row)}. {mend}")
    text = row[field]
    if not isinstance(text, str):
        raise _BadRow(f"{printable(field)}: expected a string, found {_kind_of(text)}. {mend}")
    try:
        reject_lone_surrogates(text)
    except UserError as problem:
        raise _BadRow(f"{printable(field)}: {problem}") from None
    return text


def _some(names: Iterable[str]) -> str:
    """The first names, for a message of one line."""
    return ", ".join(map(printable, islice(names, 20))) or "no keys"


def _kind_of(value: Any) -> str:
    return _JSON_NAMES.get(type(value), type(value).__name__)


def _jsonl_documents(path: Path, field: str) -> Iterator[str]:
    for number, line in _text_lines(path):
        if _blank(line):
            continue
        try:
            text = _text_of(json.loads(line), field)
        except _BadRow as problem:
            raise UserError(f"{printable(path)}:{number}: {problem}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{printable(path)}:{number}: not JSON: {first_line(error)}. Each line is one object; correct the line.") from None
        if not _blank(text):
            yield text


def _parquet_documents(path: Path, field: str) -> Iterator[str]:
    _import("pyarrow", str(path))
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                raise UserError(f"{printable(path)}: {_no_column(field, columns)}")
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    text = _text_of({field: value}, field)
                    if not _blank(text):
                        yield text
    except _BadRow as problem:
        raise UserError(f"{printable(path)}: row {number}: {problem}") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{printable(path)}: damaged or cut off, or not a parquet file: {first_line(error)}. Download or write it again.") from None


def _no_column(field: str, columns: Iterable[str]) -> str:
    return f"{printable(field)}: no such column; there are {_some(columns)}. Set data.text_field to the one that holds the text."


def _import(module: str, needed_for: str) -> Any:
    """A library that `pip install tinylm` alone does not bring, imported when it is first needed."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{printable(needed_for)}: reading it needs {module}. Install it: pip install datasets") from None


# --- step 2: the split ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """The training or the validation documents: a source, the share of it that is meant, and how many at most."""

    which: Which
    source: Source
    held_out: tuple[float, int] | None
    """fraction and seed of the validation documents, where both splits come from this source"""
    limit: int | None

    def documents(self) -> Iterator[str]:
        """The documents of the split.

        Raises:
            UserError: there are none.
        """
        read = kept = 0
        for text in self.source.documents():
            read += 1
            if self.held_out is None or is_held_out(text, *self.held_out) == (self.which == "val"):
                kept += 1
                yield text
                if kept == self.limit:
                    return
        if not kept:
            raise UserError(self._nothing(read))

    @property
    def label(self) -> str:
        """What an error calls the split: the source's name, and which of its documents are meant."""
        return f"{printable(self.source.name)}: {'validation' if self.which == 'val' else 'training'}"

    def _nothing(self, read: int) -> str:
        if not read or self.held_out is None:
            return f"{printable(self.source.name)}: no documents, only blank lines or nothing at all. Give a file with text."
        counts = f"got 0 of {read} documents (data.val_fraction {self.held_out[0]})"
        return f"{self.label} {counts}. Give more documents, another data.val_fraction, or data.val_dataset."


def is_held_out(text: str, fraction: float, seed: int) -> bool:
    """Whether a document is for validation: its hash, with the seed, falls into the first `fraction` of all hashes.

    Equal documents fall on the same side, and a stream needs no second look at what went before.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def find_split(data: DataConfig, which: Which, seed: int) -> Split:
    """The training or validation split that `data` describes; nothing of it is read yet."""
    key, name = _named(data, which)
    if is_token_file(name):
        check_token_files(data)
        raise UserError(f"data.{key}: {printable(name)} is a token file, whose documents cannot be read again. Give the text that it was made from.")
    limit = data.train_docs if which == "train" else data.val_docs
    source = find_source(data, key, name, data.split)
    if data.val_dataset is None and data.val_split is None:
        if which == "val" and isinstance(source, HubDataset) and data.streaming and limit is None:
            raise UserError("data.val_docs: holding documents out of a streamed dataset would read all of it. Set data.val_docs, for example 1000.")
        return Split(which, source, (data.val_fraction, seed), limit)
    if which == "val" and data.val_split is not None:
        source = find_source(data, key, name, data.val_split)
    if which == "val" and isinstance(source, HubDataset) and source.name == data.dataset and source.split == data.split:
        mend = "Set data.val_split to another split, or leave it out." if key == "dataset" else "Give another dataset, or set data.val_split in its place."
        raise UserError(f"data.{'val_split' if key == 'dataset' else key}: validation would be the training documents themselves. {mend}")
    return Split(which, source, None, limit)


def _named(data: DataConfig, which: Which) -> tuple[str, str]:
    """The setting that names the source of a split, and its value."""
    if which == "val" and data.val_dataset is not None:
        return "val_dataset", data.val_dataset
    return "dataset", data.dataset


def train_documents(data: DataConfig, seed: int, *, skip: int = 0) -> Iterator[str]:
    """The training documents in their order, without the first `skip`: a resumed stream goes on exactly there.

    Skipped documents are read, since only their text tells whether they are training documents, but not encoded.

    Raises:
        UserError: nothing is there, a row is no document, or no document is for training.
    """
    return islice(find_split(data, "train", seed).documents(), skip, None)


def val_documents(data: DataConfig, seed: int) -> Iterator[str]:
    """The validation documents in their order; raises as `train_documents` does."""
    return find_split(data, "val", seed).documents()


def shared_documents(data: DataConfig, seed: int) -> int:
    """How many different documents are in training and in validation: 0 where one source is split by its texts.

    Only files of text on this machine are compared; a hub dataset or a token file counts as sharing nothing.
    """
    if data.val_dataset is None or is_token_file(data.val_dataset) or is_token_file(data.dataset):
        return 0
    train, val = find_split(data, "train", seed), find_split(data, "val", seed)
    if isinstance(train.source, HubDataset) or isinstance(val.source, HubDataset):
        return 0
    digests = {_digest(text) for text in val.documents()}
    return len({digest for text in train.documents() if (digest := _digest(text)) in digests})


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


# --- step 3: ids ------------------------------------------------------------------------------------------------------


def encode_documents(documents: Iterable[str], tokenizer: Tokenizer, max_doc_len: int | None, *, source: str = "text:", first: int = 1) -> Iterator[np.ndarray]:
    """The tokens of each document, cut to `max_doc_len` and closed by EOS: (n + 1,) in the type of a token file.

    Args:
        documents: their texts.
        tokenizer: what they are encoded with.
        max_doc_len: tokens after which a document is cut.
        source: what an error calls them, such as `Split.label`.
        first: the number by which an error calls the first of them; a resumed stream does not begin at 1.

    Raises:
        UserError: naming the document that the tokenizer cannot encode.
    """
    for batch in _batches(documents):
        arrays = _encode_batch(batch, tokenizer, source, first)
        first += len(batch)
        for ids in arrays:
            tokens = np.empty(min(len(ids), max_doc_len or len(ids)) + 1, dtype=token_dtype(tokenizer.vocab_size))
            tokens[:-1] = checked_tokens(ids[: len(tokens) - 1], tokenizer.vocab_size)
            tokens[-1] = tokenizer.eos_id
            yield tokens


def _encode_batch(batch: list[str], tokenizer: Tokenizer, source: str, first: int) -> list[np.ndarray]:
    try:
        return tokenizer.encode_arrays(batch)
    except UserError:
        for number, text in enumerate(batch, start=first):  # the tokenizer does not say which of them it was
            try:
                tokenizer.encode(text)
            except UserError as problem:
                raise UserError(f"{source} document {number}: {problem}") from None
        raise


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


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


# --- step 4: the token file -------------------------------------------------------------------------------------------

# The file: a line that says what it is; the header as JSON, filled up with spaces and ended by a newline to 4096 bytes;
# then the tokens, raw and little-endian.
MAGIC = b"tinylm token file\n"
HEADER_BYTES = 4096
VERSION = 1


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
        path, mend = Path(path), mend or _give_text("dataset")
        _check_regular(path)
        with _mended(path):
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
        with _mended(self.path), open(self.path, "rb") as file:
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


# What to do about a file in data.cache_dir that is damaged.
_DELETE = "Delete it: it is made again from the text."


def _give_text(key: str) -> str:
    """What to do about a token file that the user gave as data.`key`."""
    return f"Give the text that it was made from as data.{key}."


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
    with _locked(path):
        _write(path, documents, tokenizer, source, progress)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
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
        raise UserError(f"{printable(path)}: the token file could not be written: {_reason(error)}. Make room, or choose another data.cache_dir.") from error


def _write(path: Path, documents: Iterable[np.ndarray], tokenizer: Tokenizer, source: str, progress: Callable[[int], None] | None) -> None:
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


# --- the token file of a split ----------------------------------------------------------------------------------------


def source_fingerprint(data: DataConfig, which: Which) -> str:
    """SHA-256 over what a split is made from: the contents of local files, or the name of a hub dataset."""
    key, name = _named(data, which)
    if is_token_file(name):
        return TokenFile.open(name, _give_text(key)).header.sha256
    return find_split(data, which, seed=0).source.fingerprint()  # the seed decides who is held out, not what is read


def cached_token_file(data: DataConfig, which: Which, tokenizer: Tokenizer, seed: int, *, progress: Callable[[int], None] | None = None) -> TokenFile:
    """The tokens of a split: data.dataset itself where that is a token file, else a file in data.cache_dir.

    The cached file is named by all that its content depends on, made where it is missing, and verified before use.

    Raises:
        UserError: as `train_documents`, `write_token_file` and `TokenFile.verify`, or the tokens are another tokenizer's.
    """
    check_token_files(data)
    if is_token_file(_named(data, which)[1]):
        return _given_token_file(data, which, tokenizer)
    split = find_split(data, which, seed)
    source = split.source.fingerprint()
    path = Path(data.cache_dir) / f"{which}-{_cache_key(split, source, data, tokenizer)}{BIN}"
    if not os.path.exists(path):  # unlike Path.exists, False for a name that is too long
        with _locked(path):
            if not os.path.exists(path):  # or else another process made it while this one waited
                _write(path, encode_documents(split.documents(), tokenizer, data.max_doc_len, source=split.label), tokenizer, source, progress)
    file = TokenFile.open(path, _DELETE)
    file.verify()
    file.require_tokenizer(tokenizer)
    return file


def _cache_key(split: Split, source: str, data: DataConfig, tokenizer: Tokenizer) -> str:
    """16 hex digits of everything that decides which tokens the file holds."""
    reading = [data.text_field, data.document_separator, data.max_doc_len]
    which = None if split.held_out is None else [split.which, *split.held_out]
    settings = [VERSION, source, reading, which, split.limit, tokenizer.fingerprint]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def check_token_files(data: DataConfig) -> None:
    """Raise a UserError where a token file is given together with a setting that only text can follow.

    Whichever split is asked for, all settings are looked at, so that a run says it before it trains.
    """
    if is_token_file(data.dataset):
        _refuse_set(data, "dataset", ("streaming", "dataset_config", "split", "val_split", "train_docs", "max_doc_len"))
        if data.val_dataset is None or is_token_file(data.val_dataset):  # or else they are for the validation text
            _refuse_set(data, "dataset", ("text_field", "document_separator"))
    key, name = _named(data, "val")
    if is_token_file(name):
        _refuse_set(data, key, ("val_docs",))


def _refuse_set(data: DataConfig, key: str, settings: Iterable[str]) -> None:
    """Raise a UserError for the first of `settings` that differs from its default."""
    values = data.model_dump(include=set(settings))
    for setting in settings:
        if values[setting] != DataConfig.model_fields[setting].default:
            raise UserError(f"data.{setting}: does not apply to the token file data.{key}. Take it out, or: {_give_text(key)}")


def _given_token_file(data: DataConfig, which: Which, tokenizer: Tokenizer) -> TokenFile:
    """The token file that the settings name, or the part of it that is for `which`.

    Without a val_dataset the last val_fraction of data.dataset, from the start of a document on, is for validation.
    A document that stands in the file twice can then be on both sides; text, split by content, has no such gap.
    """
    key, name = _named(data, which)
    file = TokenFile.open(name, _give_text(key))
    file.require_tokenizer(tokenizer)
    file.verify()
    if data.val_dataset is not None:
        return file
    border = _document_border(file, len(file) - round(len(file) * data.val_fraction))
    return file.between(0, border) if which == "train" else file.between(border, len(file))


def _document_border(file: TokenFile, wanted: int) -> int:
    """The first start of a document at or behind `wanted`, or else the last one before it."""
    tokens, eos = file.tokens, file.header.eos_id
    for start in range(max(wanted - 1, 0), len(tokens) - 1, BLOCK):
        ends = np.flatnonzero(tokens[start : min(start + BLOCK, len(tokens) - 1)] == eos)
        if len(ends):
            return start + int(ends[0]) + 1
    for stop in range(max(wanted - 1, 0), 0, -BLOCK):
        ends = np.flatnonzero(tokens[max(stop - BLOCK, 0) : stop] == eos)
        if len(ends):
            return max(stop - BLOCK, 0) + int(ends[-1]) + 1
    raise UserError(f"{printable(file.path)}: one document only, so none can be held out. Set data.val_dataset to a second token file.")
