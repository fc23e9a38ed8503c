"""The documents of one file, and the spans that divide it without cutting a document.

    .txt            each line, or the text between separators       }  also .gz
    .jsonl          the text field of each line's object             }
    .parquet        the text column, one batch of rows at a time

Text is UTF-8. A byte-order mark at the start of a file is dropped and \\r\\n ends a line as \\n
does; every other character is kept, NUL and U+2028 too. Blank documents are skipped. A row that is
not a document is an error with its file, line and key. Memory holds one document (or one batch of a
parquet file) at a time.

Processes that share the work on a source (common/processes.py) get its documents in chunks,
each with a `size` and `texts()`:

    SpanChunk  the documents of a byte range of a file: the process that works on it reads them
    TextChunk  documents that were already read: compressed, streamed, or only divisible by reading
    them

A worker process imports this file, so it needs neither torch, numpy nor pydantic.
"""

import gzip
import importlib
import importlib.util
import json
import os
import sys
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from tinylm.common.errors import UserError, first_line, reading
from tinylm.common.files import open_regular, require_regular

# A longer line is a binary file or a device, not a document.
LINE_BYTES_LIMIT = 2**30
# Characters that are collected before a text is searched for separators.
SEARCH_CHARACTERS = 1_000_000
PARQUET_BATCH_ROWS = 1024
# Bytes that are read at a time.
BLOCK_BYTES = 2**20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# A span ends with the first document that ends after this many bytes.
SPAN_BYTES = 2**20

# Characters of the documents in a TextChunk.
CHUNK_CHARACTERS = 2**20

Span = tuple[int, int]
"""A byte range of a file: start (included) and stop (excluded)."""
WHOLE: Span = (0, sys.maxsize)
# The fix for a stream that broke off: training continues from its checkpoint.
RESUMES = "Try again: a run resumes where it stopped"
# What `datasets` raises for a damaged file of the hub;
# the errors of pyarrow and of its JSON readers are ValueErrors.
DAMAGED = (ValueError, EOFError, zlib.error)


@dataclass
class SeparatorSeen:
    """Set by a reader of documents when it finds a separator."""

    seen: bool = False


def file_documents(
    path: Path,
    field: str,
    separator: str | None,
    span: Span = WHOLE,
    found: SeparatorSeen | None = None,
) -> Iterator[str]:
    """The documents of a file that are not blank.

    Args:
        path: the file; the end of its name decides how it is read.
        field: key or column of the text.
        separator: divides the documents of a .txt file; None: each line is one.
        span: the byte range to read, from `spans_of`.
        found: set if there is a separator.

    Raises:
        UserError: the file cannot be read, or a row is not a document.
    """
    require_regular(path)
    if path.name.endswith(".parquet"):
        return field_texts(parquet_rows(path, field), field)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return field_texts(jsonl_rows(path, span), field)
    if separator is not None:
        return _separated_documents(path, separator, span, found or SeparatorSeen())
    return (line for _, line in text_lines(path, span) if line and not line.isspace())


def end_of_document(path: Path, separator: str | None) -> bytes | None:
    """The bytes after which a document of this file has certainly ended;
    None if the file must be read from the start.

    It must for compressed data, and for a separator with line ends or one that can overlap itself,
    as `--` in `a---b`.
    """
    if not path.name.endswith((".txt", ".jsonl")):
        return None
    if separator is None or path.name.endswith(".jsonl"):
        return b"\n"
    overlaps = any(separator.startswith(separator[place:]) for place in range(1, len(separator)))
    return None if overlaps or "\n" in separator or "\r" in separator else separator.encode()


def spans_of(path: Path, end: bytes) -> Iterator[Span]:
    """The file in spans of at least `SPAN_BYTES`, each up to the next `end`;
    they depend on the file alone.
    """
    with reading(path), open_regular(path) as file:
        size = os.path.getsize(path)
        start = 0
        while start < size:
            stop = start + SPAN_BYTES
            file.seek(min(stop, size))
            # An end that is cut by the border of two blocks is missed: the span is longer then,
            # which does no harm.
            while block := file.read(SPAN_BYTES):
                found = block.find(end)
                if found >= 0:
                    stop += found + len(end)
                    break
                stop += len(block)
            yield start, min(stop, size)
            start = stop


def _open(path: Path) -> BinaryIO:
    if path.name.endswith(".gz"):
        require_regular(path)
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return open_regular(path)


@dataclass(frozen=True)
class Line:
    """The location of a line, in errors `file:line`.
    The lines before its span are only counted for that text.
    """

    path: Path
    span_start: int
    number: int
    """in its span, from 1"""

    def __str__(self) -> str:
        before, left = 0, self.span_start
        with _open(self.path) as file:
            while left and (block := file.read(min(left, SPAN_BYTES))):
                before += block.count(b"\n")
                left -= len(block)
        return f"{self.path}:{before + self.number}"


def text_lines(path: Path, span: Span = WHOLE) -> Iterator[tuple[Line, str]]:
    """The location of each line, and its text without its end."""
    offset, stop = span
    number = 0
    with reading(path), _open(path) as file:
        file.seek(offset)
        while raw := file.readline(min(LINE_BYTES_LIMIT, stop - offset)):
            number += 1
            line = Line(path, span[0], number)
            if len(raw) == LINE_BYTES_LIMIT:
                problem = f"a line of at least {LINE_BYTES_LIMIT} bytes"
                raise UserError(line, problem, "Is it text? Cut it into documents")
            mark = 3 if offset == 0 and raw.startswith(BYTE_ORDER_MARK) else 0
            try:
                text = raw[mark:].decode()
            except UnicodeDecodeError as error:
                at = mark + error.start
                problem = f"not UTF-8 text: byte 0x{raw[at]:02x} at offset {offset + at}"
                raise UserError(line, problem, "Save the file as UTF-8") from None
            yield line, text.removesuffix("\n").removesuffix("\r")
            offset += len(raw)


def is_blank(text: str) -> bool:
    return not text or text.isspace()


def _separated_documents(
    path: Path, separator: str, span: Span, found: SeparatorSeen
) -> Iterator[str]:
    """The text between separators, without line ends around it."""
    separator = separator.replace("\r\n", "\n")  # as in the text
    pending: list[str] = []
    held = 0
    for text in _text_blocks(path, span):
        pending.append(text)
        held += len(text)
        if held > SEARCH_CHARACTERS:
            *whole, rest = "".join(pending).split(separator)
            found.seen |= bool(whole)
            yield from _trimmed(whole)
            pending = [rest]
            held = 0
            if not whole and len(rest) >= SEARCH_CHARACTERS:
                # A longer document is searched again when it has doubled,
                # so that the work stays linear.
                held = SEARCH_CHARACTERS - len(rest)
    last = "".join(pending).split(separator)
    found.seen |= len(last) > 1
    yield from _trimmed(last)


def _text_blocks(path: Path, span: Span) -> Iterator[str]:
    """The text of `text_lines` in blocks of whole lines, which is several times as fast.
    Every line ends in \\n.
    """
    start, stop = span
    with reading(path), _open(path) as file:
        file.seek(start)
        while block := file.read(min(BLOCK_BYTES, stop - start)):
            block += file.readline(min(LINE_BYTES_LIMIT, stop - start - len(block)))
            try:
                text = block.decode("utf-8-sig" if start == 0 else "utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError:
                # Read line by line, the block raises an error with the line.
                deque(text_lines(path, (start, start + len(block))), maxlen=0)
                raise
            start += len(block)
            yield text if text.endswith("\n") else text.removesuffix("\r") + "\n"


def _trimmed(texts: Iterable[str]) -> Iterator[str]:
    return (text.strip("\n") for text in texts if not is_blank(text))


_JSON_NAMES = {
    bool: "a boolean",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
    str: "a string",
}


# Keys and files of rows for fine-tuning, which have no documents, and what to do with them.
ROW_KEYS = {"instruction", "messages", "conversations", "prompt", "question", "chosen"}
ROW_ONLY_FILES = (".json", "SMSSpamCollection")
ROWS_ARE_FOR = "Rows of questions and answers are for finetune.py"


def _text_of(row: Any, field: str) -> str:
    """The document in a row."""
    fix = ("Correct the row, or set {} to the key that holds the text", "data.text_field")
    if not isinstance(row, dict):
        problem = f'expected an object such as {{"{field}": "..."}}, found {kind_of(row)}'
        raise UserError((), problem, *fix)
    if field not in row:
        if ROW_KEYS & row.keys():
            fix = (f"{fix[0]}. {ROWS_ARE_FOR}", *fix[1:])
        raise UserError(field, f"missing; the row has {some_of(row)}", *fix)
    text = row[field]
    if not isinstance(text, str):
        raise UserError(field, f"expected a string, found {kind_of(text)}", *fix)
    try:
        reject_lone_surrogates(text)
    except UserError as error:
        raise error.within(field) from None
    return text


def some_of(names: Iterable[str]) -> str:
    """The first 20 names, for a message of one line."""
    return ", ".join(map(str, islice(names, 20))) or "no keys"


def kind_of(value: Any) -> str:
    return _JSON_NAMES.get(type(value), type(value).__name__)


def field_texts(rows: Iterable[tuple[object, Any]], field: str) -> Iterator[str]:
    """The document of each row that has one and is not blank."""
    for location, row in rows:
        try:
            text = _text_of(row, field)
        except UserError as error:
            raise error.within(location) from None
        if not is_blank(text):
            yield text


def jsonl_rows(path: Path, span: Span = WHOLE) -> Iterator[tuple[Line, Any]]:
    """The value in each line of a .jsonl file, or of a span of it, with its location;
    blank lines are skipped.
    """
    for location, line in text_lines(path, span):
        if is_blank(line):
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problem = f"not JSON: {first_line(error)}"
            raise UserError(
                location, problem, "Each line is one object; correct the line"
            ) from None
        yield location, row


def parquet_rows(path: Path, field: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a .parquet file with its location for errors: all of its columns,
    or `field` alone.
    """
    require_regular(path)
    import_optional("pyarrow", path)
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field is not None and field not in columns:
                raise no_column(path, field, columns)
            wanted = None if field is None else [field]
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        problem = f"damaged or truncated, or not a parquet file: {first_line(error)}"
        raise UserError(path, problem, "Download or write it again") from None


def no_column(where: object, field: str, columns: Iterable[str]) -> UserError:
    """The error to raise if a dataset does not have the text column."""
    problem = f"no such column; there are {some_of(columns)}"
    fix = "Set {} to the one that holds the text"
    return UserError((where, field), problem, fix, "data.text_field")


def require_optional(module: str, needed_for: object) -> None:
    """Raise a UserError if a library that `pip install tinylm` alone does not install
    is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise _not_installed(module, needed_for)


def import_optional(module: str, needed_for: object) -> Any:
    """A library that `pip install tinylm` alone does not install."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise _not_installed(module, needed_for) from None


def _not_installed(module: str, needed_for: object) -> UserError:
    fix = "Install it: pip install datasets"
    return UserError(needed_for, f"reading it needs {module}", fix)


def reject_lone_surrogates(text: str) -> None:
    """Raise a UserError if `text` has half a UTF-16 pair, which a UTF-8 file cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"the lone surrogate {text[error.start]} at position {error.start}"
        raise UserError(
            (),
            f"the text has {found}, which is half a character",
            "Remove it, or write the whole character",
        ) from None


# --- documents for several processes ---


@dataclass(frozen=True)
class TextChunk:
    """Documents that were already read, and the error that ended the reading."""

    documents: list[str]
    error: UserError | None = None
    separated: bool = False
    """whether a separator was met up to here"""

    @property
    def size(self) -> int:
        """Characters."""
        return sum(map(len, self.documents))

    def texts(self, found: SeparatorSeen | None = None) -> Iterator[str]:
        """The documents, then the error; a separator is noted in `found`."""
        if found is not None:
            found.seen |= self.separated
        yield from self.documents
        if self.error is not None:
            raise self.error


@dataclass(frozen=True)
class SpanChunk:
    """The documents of a byte range of a file."""

    path: Path
    field: str
    separator: str | None
    span: Span

    @property
    def size(self) -> int:
        """Bytes."""
        return self.span[1] - self.span[0]

    def texts(self, found: SeparatorSeen | None = None) -> Iterator[str]:
        """The documents; a separator is noted in `found`."""
        return file_documents(self.path, self.field, self.separator, self.span, found)


def text_chunks(
    documents: Iterable[str], found: SeparatorSeen | None = None
) -> Iterator[TextChunk]:
    """Documents in chunks of about `CHUNK_CHARACTERS`;
    an error in reading them is in the last chunk.

    Args:
        documents: their texts.
        found: where the reader of the documents notes separators.
    """
    texts: list[str] = []
    n_characters = 0
    error = None
    try:
        for text in documents:
            texts.append(text)
            n_characters += len(text)
            if n_characters >= CHUNK_CHARACTERS:
                yield TextChunk(texts, None, found is not None and found.seen)
                texts = []
                n_characters = 0
    except UserError as problem:
        error = problem
    if texts or error is not None:
        yield TextChunk(texts, error, found is not None and found.seen)
