r"""Documents: where they come from, and which are held out.

    1. source     .txt, .jsonl, .parquet (also .txt.gz, .jsonl.gz), a folder or glob of them, or a Hugging Face dataset
                                                        ─▶ str, one a document, in a fixed order       `find_source`
                  plain files also in spans, none of which cuts a document                              `spans_of`
    2. split      training or validation, decided by the text of each document                          `train_documents`

Text is UTF-8. A byte-order mark at the start of a file is dropped, and \r\n ends a line as \n does; every other character
stays as it is, NUL and U+2028 too. Blank documents are skipped. A row that is no document is an error that names its
file, line and key. Memory holds one document (or one batch of a parquet file) at a time, never a whole source.

Everything that reads documents asks here; encode.py makes tokens of them, packing.py rows of those.
"""

import glob
import gzip
import hashlib
import json
import os
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, NoReturn, TypeVar

from tinylm.config import DataConfig
from tinylm.errors import UserError, printable, reading, reason, require_regular
from tinylm.tokenfile import BIN, TOKEN_FILES, is_token_file
from tinylm.tokenizer import first_line, hub_errors, is_hub_name, reject_lone_surrogates, require_hub

Which = Literal["train", "val"]
T = TypeVar("T")

# What the names of files end in that can be read for one purpose.
Kinds = tuple[str, ...]
DOCUMENT_FILES: Kinds = (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz")
# A line without end is a binary file or a device, not a document.
LINE_BYTES_LIMIT = 2**30
# Characters that are held before a text is searched for separators.
SEARCH_CHARACTERS = 1_000_000
PARQUET_BATCH_ROWS = 1024
# Bytes that are read at once where lines do not matter.
BLOCK_BYTES = 2**20
# Bytes after which the next end of a document ends a span.
SPAN_BYTES = 2**20

Span = tuple[int, int]
"""Bytes of a file: from the first offset to before the second."""
WHOLE: Span = (0, sys.maxsize)
# What to do about a stream that broke off: training goes on from its checkpoint.
RESUMES = "Try again: a run resumes where it stopped."
# What `datasets` lets through where a file of the hub is cut off or not of its kind; pyarrow's and the JSON readers' errors are ValueErrors.
DAMAGED = (ValueError, EOFError, zlib.error)


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
            yield from file_documents(path, self.field, self.separator)

    def fingerprint(self) -> str:
        """SHA-256 over the kinds and contents of the files, read in blocks."""
        digest = hashlib.sha256()
        for path in self.paths:
            require_regular(path)
            with reading(path), open(path, "rb") as file:
                digest.update(f"{_suffix(path.name, DOCUMENT_FILES)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the Hugging Face hub, downloaded whole or streamed."""

    name: str
    config: str | None
    split: str
    streaming: bool
    field: str | None
    """the column that holds a document's text; None: rows are read, with all their columns"""
    again: str = RESUMES
    """what an error tells the user to do where the network fails"""

    def documents(self) -> Iterator[str]:
        """Every document that is not blank, in the order of the dataset."""
        if self.field is None:
            raise ValueError("documents are read from one column, and this dataset was found for its rows")
        return _texts(self.rows(), self.field)

    def fingerprint(self) -> str:
        """SHA-256 over the name: what the hub stores under it is not read."""
        return hashlib.sha256(f"hub {self.name} {self.config} {self.split}".encode()).hexdigest()

    def rows(self) -> Iterator[tuple[str, Any]]:
        """Each row, with the place that an error calls it by."""
        dataset = self._load()
        try:
            for number, row in enumerate(dataset, start=1):
                yield f"{self.name} ({self.split}): row {number}", row
        except hub_errors() as error:
            raise UserError(f"{self.name} ({self.split}): reading stopped: {first_line(error)}. {self.again}") from error
        except DAMAGED as error:
            raise UserError(f"{self.name} ({self.split}): a file of it is damaged: {first_line(error)}. Give another dataset, or local files.") from error

    def _load(self) -> Iterable[Any]:
        """The library's dataset, with the text column alone where it says which columns there are."""
        mend = "Give a local file or folder as data.dataset."
        require_hub(f"data.dataset: {self.name}", mend)
        datasets = _import("datasets", self.name)
        try:
            dataset = datasets.load_dataset(self.name, self.config, split=self.split, streaming=self.streaming)
        except (*hub_errors(), *DAMAGED, datasets.exceptions.DatasetsError) as error:
            raise UserError(f"data.dataset: {self.name}: {first_line(error)}. Check data.dataset_config and data.split, or: {mend}") from error
        columns = dataset.column_names
        if columns is None or self.field is None:
            return dataset
        if self.field not in columns:
            raise UserError(f"{self.name} ({self.split}): {_no_column(self.field, columns)}")
        return dataset.select_columns([self.field])


@dataclass(frozen=True)
class Together:
    """Several sources, one behind the other."""

    sources: tuple[LocalFiles | HubDataset, ...]

    @property
    def name(self) -> str:
        return " ".join(source.name for source in self.sources)

    def documents(self) -> Iterator[str]:
        """Every document that is not blank."""
        return chain.from_iterable(source.documents() for source in self.sources)

    def fingerprint(self) -> str:
        """SHA-256 over the fingerprints of the sources."""
        return hashlib.sha256("\n".join(source.fingerprint() for source in self.sources).encode()).hexdigest()


Source = LocalFiles | HubDataset | Together


def sources_named(names: Sequence[str], field: str = "text", separator: str | None = None, *, again: str = "Try again.") -> Together:
    """What a command's --data means: files that are here, or hf:owner/name[:config[:split]], a dataset on the hub that is streamed.

    Args:
        names: what was given.
        field: column or key that holds a document's text.
        separator: what divides documents in a .txt file; None: each line is one.
        again: what an error tells the user to do where the network fails.

    Raises:
        UserError: nothing is there, or nothing there is a document file.
    """
    return Together(tuple(_source_named(name, field, separator, again) for name in names))


def _source_named(name: str, field: str, separator: str | None, again: str) -> LocalFiles | HubDataset:
    if name.startswith("hf:"):
        dataset, config, split, *rest = [*name.removeprefix("hf:").split(":"), "", "", ""]
        if any(rest) or "/" not in dataset or not is_hub_name(dataset):
            raise UserError(f"--data: {printable(name)}: a dataset on the hub is written hf:owner/name, hf:owner/name:config or hf:owner/name:config:split.")
        return HubDataset(dataset, config or None, split or "train", True, field, again)
    if not os.path.lexists(name) and not glob.has_magic(name):
        raise UserError(f"--data: {printable(name)}: not found. Give a file, a folder, a glob, or a dataset on the hub written hf:owner/name.")
    return LocalFiles(name, _find_files(name, "--data", DOCUMENT_FILES), field, separator)


def find_source(data: DataConfig, key: str, name: str, split: str, kinds: Kinds = DOCUMENT_FILES) -> LocalFiles | HubDataset:
    """What `name`, the value of the setting data.`key`, means: files of these kinds that are here, or else a dataset on the hub.

    data.dataset_config belongs to data.dataset: a val_dataset on the hub is read in its default configuration.

    Raises:
        UserError: it is a path and nothing is there, or nothing there is a document file.
    """
    if os.path.lexists(name) or glob.has_magic(name):
        if key == "dataset" and (data.dataset_config is not None or data.split != "train" or data.val_split is not None):
            raise UserError(f"data.dataset: {printable(name)} is on this machine, where files have no splits. Take split, val_split and dataset_config out.")
        return LocalFiles(name, _find_files(name, f"data.{key}", kinds), data.text_field, data.document_separator)
    if not is_hub_name(name) or "/" not in name or _suffix(name, kinds) or name.endswith((*TOKEN_FILES, ".json", ".csv")):
        raise UserError(f"data.{key}: {printable(name)}: not found. Give a file, a folder, a glob, or a Hugging Face name written owner/name.")
    field = data.text_field if kinds is DOCUMENT_FILES else None
    return HubDataset(name, data.dataset_config if key == "dataset" else None, split, data.streaming, field)


def _find_files(name: str, setting: str, kinds: Kinds) -> tuple[Path, ...]:
    """The files of these kinds that a path or glob, the value of `setting`, stands for, sorted; folders are searched to their bottom."""
    wanted = f"{'documents' if kinds is DOCUMENT_FILES else 'rows'} ({', '.join(kinds)})"
    if os.path.isdir(name):
        found, place = files_in(name, kinds), "in this folder"
    elif os.path.lexists(name):
        require_regular(Path(name))
        if not _suffix(name, kinds):
            raise UserError(f"{setting}: {printable(name)}: not a kind of file with {wanted}. Convert it, or name it by its kind.")
        return (Path(name),)
    else:
        found = [Path(path) for path in glob.glob(name, recursive=True) if _suffix(path, kinds) and not os.path.isdir(path)]
        place = "matches"
    if not found:
        raise UserError(f"{setting}: {printable(name)}: no file of a kind with {wanted} {place}. Give the path of one.")
    return tuple(sorted(found))


def files_in(folder: str, kinds: Kinds) -> list[Path]:
    """The files of these kinds in a folder and all folders in it, hidden ones left out."""
    found = [Path(inner, file) for inner, _, files in os.walk(folder, onerror=_refuse_folder) for file in files if _suffix(file, kinds)]
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _refuse_folder(error: OSError) -> NoReturn:
    raise UserError(f"{printable(error.filename)}: {reason(error)}. Give a folder that can be read.")


def _suffix(name: str, kinds: Kinds) -> str | None:
    """Which of these kinds a file name ends in."""
    return next((suffix for suffix in kinds if name.endswith(suffix)), None)


@dataclass
class Met:
    """What was met while documents were read."""

    separator: bool = False
    """whether there was one"""


def file_documents(path: Path, field: str, separator: str | None, span: Span = WHOLE, met: Met | None = None) -> Iterator[str]:
    """Every document of one file, or of a span of it from `spans_of`, that is not blank; `met` is told of separators."""
    require_regular(path)
    if path.name.endswith(".parquet"):
        return _texts(parquet_rows(path, field), field)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _texts(jsonl_rows(path, span), field)
    if separator is not None:
        return _separated_documents(path, separator, span, met or Met())
    return (line for _, line in text_lines(path, span) if not is_blank(line))


def end_of_document(path: Path, separator: str | None) -> bytes | None:
    """The bytes behind which a document of this file is over for certain; None where only reading from the start can tell.

    That is compressed data, and a separator that has line ends or may overlap itself, as `--` does in `a---b`.
    """
    if not path.name.endswith((".txt", ".jsonl")):
        return None
    if separator is None or path.name.endswith(".jsonl"):
        return b"\n"
    overlaps = any(separator.startswith(separator[place:]) for place in range(1, len(separator)))
    return None if overlaps or "\n" in separator or "\r" in separator else separator.encode()


def spans_of(path: Path, end: bytes) -> Iterator[Span]:
    """The file in spans of `SPAN_BYTES` and what is left to the next `end`; they depend on the file alone."""
    with reading(path), open(path, "rb") as file:
        start, size = 0, os.path.getsize(path)
        while start < size:
            stop = min(_behind(file, end, start + SPAN_BYTES), size)
            yield start, stop
            start = stop


def _behind(file: BinaryIO, end: bytes, place: int) -> int:
    """Where an `end` at or behind `place` is over, or else the end of the file; one that two blocks share is passed over."""
    file.seek(place)
    while block := file.read(SPAN_BYTES):
        found = block.find(end)
        if found >= 0:
            return place + found + len(end)
        place += len(block)
    return place


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


class Line(NamedTuple):
    """Where a line stands; the lines before its span are counted when an error names it, and not while all goes well."""

    path: Path
    span_start: int
    number: int
    """from 1, in the span"""

    def __str__(self) -> str:
        before, left = 0, self.span_start
        with _open(self.path) as file:
            while left and (block := file.read(min(left, SPAN_BYTES))):
                before += block.count(b"\n")
                left -= len(block)
        return f"{printable(self.path)}:{before + self.number}"


def _raw_lines(path: Path, span: Span) -> Iterator[tuple[Line, int, bytes]]:
    """Lines as they stand in the file, ends included, each with its place and offset; cut at \\n alone."""
    offset, stop = span
    number = 0
    with _open(path) as file:
        file.seek(offset)
        while raw := file.readline(min(LINE_BYTES_LIMIT, stop - offset)):
            line = Line(path, span[0], number := number + 1)
            if len(raw) == LINE_BYTES_LIMIT:
                raise UserError(f"{line}: a line of {LINE_BYTES_LIMIT} bytes and more. Is it text? Cut it into documents.")
            yield line, offset, raw
            offset += len(raw)


def text_lines(path: Path, span: Span = WHOLE) -> Iterator[tuple[Line, str]]:
    """The place of each line, and its text without its end."""
    with reading(path):
        for place, offset, raw in _raw_lines(path, span):
            line = raw[3:] if offset == 0 and raw.startswith(b"\xef\xbb\xbf") else raw
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                at = offset + len(raw) - len(line) + error.start
                raise UserError(f"{place}: not UTF-8 text: byte 0x{line[error.start]:02x} at offset {at}. Save the file as UTF-8.") from None
            yield place, text.removesuffix("\n").removesuffix("\r")


def is_blank(text: str) -> bool:
    return not text or text.isspace()


def _separated_documents(path: Path, separator: str, span: Span, met: Met) -> Iterator[str]:
    """The text between separators, without line ends around it."""
    separator = separator.replace("\r\n", "\n")  # as in the text
    pending: list[str] = []
    held = 0
    for text in _text_blocks(path, span):
        pending.append(text)
        held += len(text)
        if held > SEARCH_CHARACTERS:
            *whole, rest = "".join(pending).split(separator)
            met.separator |= bool(whole)
            yield from _trimmed(whole)
            # A longer document is searched again when it has doubled, so that the work stays linear.
            pending, held = [rest], 0 if whole or len(rest) < SEARCH_CHARACTERS else SEARCH_CHARACTERS - len(rest)
    last = "".join(pending).split(separator)
    met.separator |= len(last) > 1
    yield from _trimmed(last)


def _text_blocks(path: Path, span: Span) -> Iterator[str]:
    """The text of `text_lines` in blocks of whole lines, several times as fast: each line ends in \\n, the last one too."""
    start, stop = span
    with reading(path), _open(path) as file:
        file.seek(start)
        while block := file.read(min(BLOCK_BYTES, stop - start)):
            block += file.readline(min(LINE_BYTES_LIMIT, stop - start - len(block)))
            try:
                text = block.decode("utf-8-sig" if start == 0 else "utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError:
                deque(text_lines(path, (start, start + len(block))), maxlen=0)  # raises it as well, and knows the line
                raise
            start += len(block)
            yield text if text.endswith("\n") else text.removesuffix("\r") + "\n"


def _trimmed(texts: Iterable[str]) -> Iterator[str]:
    return (text.strip("\n") for text in texts if not is_blank(text))


class _BadRow(Exception):
    """What is wrong with a row; the reader adds where it stands."""


_JSON_NAMES = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object", type(None): "null", str: "a string"}


def _text_of(row: Any, field: str) -> str:
    """The document in a row."""
    mend = "Correct the row, or set data.text_field to the key that holds the text."
    if not isinstance(row, dict):
        raise _BadRow(f'expected an object such as {{"{printable(field)}": "..."}}, found {kind_of(row)}. {mend}')
    if field not in row:
        raise _BadRow(f"{printable(field)}: missing; the row has {some_of(row)}. {mend}")
    text = row[field]
    if not isinstance(text, str):
        raise _BadRow(f"{printable(field)}: expected a string, found {kind_of(text)}. {mend}")
    try:
        reject_lone_surrogates(text)
    except UserError as problem:
        raise _BadRow(f"{printable(field)}: {problem}") from None
    return text


def some_of(names: Iterable[str]) -> str:
    """The first names, for a message of one line."""
    return ", ".join(map(printable, islice(names, 20))) or "no keys"


def kind_of(value: Any) -> str:
    return _JSON_NAMES.get(type(value), type(value).__name__)


def _texts(rows: Iterable[tuple[object, Any]], field: str) -> Iterator[str]:
    """The document of each row that has one and is not blank."""
    for place, row in rows:
        try:
            text = _text_of(row, field)
        except _BadRow as problem:
            raise UserError(f"{place}: {problem}") from None
        if not is_blank(text):
            yield text


def jsonl_rows(path: Path, span: Span = WHOLE) -> Iterator[tuple[Line, Any]]:
    """What each line of a .jsonl file, or of a span of it, holds, with its place; blank lines are passed over."""
    for place, line in text_lines(path, span):
        if is_blank(line):
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: not JSON: {first_line(error)}. Each line is one object; correct the line.") from None
        yield place, row


def parquet_rows(path: Path, field: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a .parquet file, with the place that an error calls it by: all of its columns, or `field` alone."""
    _import("pyarrow", str(path))
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field is not None and field not in columns:
                raise UserError(f"{printable(path)}: {_no_column(field, columns)}")
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=None if field is None else [field]):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{printable(path)}: row {number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{printable(path)}: damaged or cut off, or not a parquet file: {first_line(error)}. Download or write it again.") from None


def _no_column(field: str, columns: Iterable[str]) -> str:
    return f"{printable(field)}: no such column; there are {some_of(columns)}. Set data.text_field to the one that holds the text."


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
        return self.choose(self.source.documents(), lambda text: text)

    def choose(self, items: Iterable[T], text_of: Callable[[T], str], *, kind: str = "documents") -> Iterator[T]:
        """Those of all of the source's documents, or rows, that are in the split, told by their text.

        Raises:
            UserError: there are none.
        """
        read = kept = 0
        for item in items:
            read += 1
            if self.has(text_of(item)):
                kept += 1
                yield item
                if kept == self.limit:
                    return
        if not kept:
            raise self.nothing(read, kind)

    def has(self, text: str) -> bool:
        """Whether a document of the source is in this split, were it not for the limit."""
        return self.held_out is None or is_held_out(text, *self.held_out) == (self.which == "val")

    @property
    def label(self) -> str:
        """What an error calls the split: the source's name, and which of its documents are meant."""
        return f"{printable(self.source.name)}: {'validation' if self.which == 'val' else 'training'}"

    def nothing(self, read: int, kind: str = "documents") -> UserError:
        """The error to raise where none of the `read` documents, or rows, of the source is in the split."""
        name = printable(self.source.name)
        if not read or self.held_out is None:
            return UserError(f"{name}: no {kind}, only blank lines or nothing at all. Give a file with {'text' if kind == 'documents' else kind}.")
        counts = f"got 0 of {read} {kind} (data.val_fraction {self.held_out[0]})"
        return UserError(f"{self.label} {counts}. Give more {kind}, another data.val_fraction, or data.val_dataset.")


def is_held_out(text: str, fraction: float, seed: int) -> bool:
    """Whether a document is for validation: its hash, with the seed, falls into the first `fraction` of all hashes.

    Equal documents fall on the same side, and a stream needs no second look at what went before.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def find_split(data: DataConfig, which: Which, seed: int, kinds: Kinds = DOCUMENT_FILES) -> Split:
    """The training or validation split that `data` describes, in files of these kinds or on the hub; nothing of it is read yet."""
    key, name = named_source(data, which)
    if is_token_file(name):
        check_token_files(data)
        found = f"{printable(name)} is a token file, whose documents cannot be read again"
        raise UserError(f"data.{key}: {found}. Set tokenizer.path to the tokenizer that it was encoded with.")
    limit = data.train_docs if which == "train" else data.val_docs
    source = find_source(data, key, name, data.split, kinds)
    if data.val_dataset is None and data.val_split is None:
        if which == "val" and isinstance(source, HubDataset) and data.streaming and limit is None:
            raise UserError("data.val_docs: holding documents out of a streamed dataset would read all of it. Set data.val_docs, for example 1000.")
        return Split(which, source, (data.val_fraction, seed), limit)
    if which == "val" and data.val_split is not None:
        source = find_source(data, key, name, data.val_split, kinds)
    if which == "val" and isinstance(source, HubDataset) and source.name == data.dataset and source.split == data.split:
        mend = "Set data.val_split to another split, or leave it out." if key == "dataset" else "Give another dataset, or set data.val_split in its place."
        raise UserError(f"data.{'val_split' if key == 'dataset' else key}: validation would be the training documents themselves. {mend}")
    return Split(which, source, None, limit)


def named_source(data: DataConfig, which: Which) -> tuple[str, str]:
    """The setting that names the source of a split, and its value; of a mixture each part has its own."""
    if which == "val" and data.val_dataset is not None:
        return "val_dataset", data.val_dataset
    if data.mix is not None:
        raise ValueError("a mixture has several sources: mix_parts")
    return "dataset", data.dataset


def mix_parts(data: DataConfig) -> tuple[DataConfig, ...]:
    """Each source of data.mix as the settings of a run that has no other; the settings themselves where they have no mixture.

    A token file beside texts keeps none of the settings that are for those.
    """
    if data.mix is None:
        return (data,)
    for_text = {name: DataConfig.model_fields[name].default for name in ("text_field", "document_separator", "max_doc_len")}
    has_text = not all(is_token_file(part.dataset) for part in data.mix)
    bare_val = (data.val_dataset or "").endswith(BIN)  # its ids have the type that the settings say, whatever the part is
    dtypes = [data.token_dtype if bare_val or part.dataset.endswith(BIN) else None for part in data.mix]
    alone = [{"mix": None, "dataset": part.dataset, "token_dtype": dtype} for part, dtype in zip(data.mix, dtypes, strict=True)]
    return tuple(data.model_copy(update=one | (for_text if has_text and is_token_file(one["dataset"]) else {})) for one in alone)


def train_documents(data: DataConfig, seed: int, *, skip: int = 0) -> Iterator[str]:
    """The training documents in their order, without the first `skip`: a resumed stream goes on exactly there.

    Skipped documents are read, since only their text tells whether they are training documents, but not encoded.

    Raises:
        UserError: nothing is there, a row is no document, or no document is for training.
    """
    return islice(find_split(data, "train", seed).documents(), skip, None)


def shared_documents(data: DataConfig, seed: int) -> int:
    """How many different documents are in training and in validation: 0 where each source is split by its texts.

    Only files of text on this machine are compared; a hub dataset or a token file counts as sharing nothing.
    """
    parts = [part for part in mix_parts(data) if not is_token_file(part.dataset)]
    if not parts or data.val_dataset is None or is_token_file(data.val_dataset):
        return 0
    val, trains = find_split(parts[0], "val", seed), [find_split(part, "train", seed) for part in parts]
    local = [train for train in trains if isinstance(train.source, LocalFiles)]
    if not local or not isinstance(val.source, LocalFiles):
        return 0
    digests = {_digest(text) for text in val.documents()}
    return len({digest for train in local for text in train.documents() if (digest := _digest(text)) in digests})


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def check_token_files(data: DataConfig) -> None:
    """Raise a UserError where a token file is given together with a setting that only text can follow.

    Whichever split is asked for, all settings are looked at, so that a run says it before it trains.
    """
    if is_token_file(data.dataset):
        _refuse_set(data, "dataset", ("streaming", "dataset_config", "split", "val_split", "train_docs", "max_doc_len"))
        if data.val_dataset is None or is_token_file(data.val_dataset):  # or else they are for the validation text
            _refuse_set(data, "dataset", ("text_field", "document_separator"))
    key, name = named_source(data, "val")
    if is_token_file(name):
        _refuse_set(data, key, ("val_docs",))
    if data.token_dtype is not None and not data.dataset.endswith(BIN) and not (data.val_dataset or "").endswith(BIN):
        raise UserError("data.token_dtype: is for a bare .bin, and neither data.dataset nor data.val_dataset is one. Take it out.")


def _refuse_set(data: DataConfig, key: str, settings: Iterable[str]) -> None:
    """Raise a UserError for the first of `settings` that differs from its default."""
    values = data.model_dump(include=set(settings))
    for setting in settings:
        if values[setting] != DataConfig.model_fields[setting].default:
            raise UserError(f"data.{setting}: does not apply to the token file data.{key}. Take it out, or: {give_text(key)}")


def give_text(key: str) -> str:
    """What to do about a token file that the user gave as data.`key`."""
    return f"Give the text that it was made from as data.{key}."
