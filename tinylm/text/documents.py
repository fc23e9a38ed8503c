"""The documents of one file, and the spans that divide it without cutting a document.

    .txt                          each line, or the text between separators
    .jsonl .json .csv .tsv        the text field of each row: of the object in a line, the item of a
    .parquet                      list, the line of a table, a batch of rows at a time
    .md .html                     the whole file, of a page its main text

All but .parquet may be compressed: .gz, .bz2, .xz, .zst, known by their first bytes. Each reader
that most runs do not need is a file of its own, imported at its first use.

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

import json
import os
import re
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

# compression and the readers of single formats are imported at their first use
from tinylm import text as formats
from tinylm.common.errors import UserError, first_line
from tinylm.common.files import COMPRESSED, COMPRESSED_ENDS, open_regular, reading, require_regular
from tinylm.text.row_text import field_texts, is_blank

# The end of a name that decides how a file is read: .txt for a.txt.gz.
KIND = re.compile(
    r"(\.(?:txt|jsonl|json|csv|tsv|parquet|md|html?))"
    rf"(?:{'|'.join(map(re.escape, COMPRESSED_ENDS))})?$"
)
# A longer line is a binary file or a device, not a document.
LINE_BYTES_LIMIT = 2**30
# Characters that are collected before a text is searched for separators.
SEARCH_CHARACTERS = 1_000_000
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
    if path.name.endswith(".jsonl"):
        return field_texts(jsonl_rows(path, span), field)
    if not path.name.endswith(".txt"):
        kind = file_kind(path)
        if kind in ROW_READERS:
            return field_texts(ROW_READERS[kind](path, field), field)
        if kind in WHOLE_FILES:
            return _trimmed(_whole_file(path, kind))
    if separator is not None:
        return _separated_documents(path, separator, span, found or SeparatorSeen())
    return (line for _, line in text_lines(path, span) if line and not line.isspace())


def file_kind(path: Path) -> str:
    """`.txt` for a.txt and for a.txt.gz: what decides how a file is read."""
    found = KIND.search(path.name)
    return found[1] if found else ".txt"


def end_of_document(path: Path, separator: str | None) -> bytes | None:
    """The bytes after which a document of this file has certainly ended;
    None if the file must be read from the start.

    It must for compressed data, and for a separator with line ends or one that can overlap itself,
    as `--` in `a---b`.
    """
    if not path.name.endswith((".txt", ".jsonl")):
        return None
    with open_regular(path) as file:
        if COMPRESSED.match(file.peek()):
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


def open_text(path: Path) -> BinaryIO:
    """A file, open to read its bytes; of compressed data, what they contain, from the start."""
    file = open_regular(path)
    compression = COMPRESSED.match(file.peek())
    if compression is None:
        return file
    return formats.compression.decompressed(path, file, str(compression.lastgroup))


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
        with open_text(self.path) as file:
            while left and (block := file.read(min(left, SPAN_BYTES))):
                before += block.count(b"\n")
                left -= len(block)
        return f"{self.path}:{before + self.number}"


def text_lines(
    path: Path, span: Span = WHOLE, *, with_ends: bool = False
) -> Iterator[tuple[Line, str]]:
    """The location of each line, and its text without its end, or with it."""
    offset, stop = span
    number = 0
    with reading(path), open_text(path) as file:
        if offset:
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
            yield line, text if with_ends else text.removesuffix("\n").removesuffix("\r")
            offset += len(raw)


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
    with reading(path), open_text(path) as file:
        if start:
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


def _whole_file(path: Path, kind: str) -> Iterator[str]:
    """The text of a file that is one document."""
    if kind == ".md":
        parts: list[str] = []
        n_characters = 0
        for text in _text_blocks(path, WHOLE):
            parts.append(text)
            n_characters += len(text)
            _require_size(path, n_characters)
        yield "".join(parts)
        return
    blocks: list[bytes] = []
    with reading(path), open_text(path) as file:
        while block := file.read(BLOCK_BYTES):
            blocks.append(block)
            _require_size(path, len(blocks) * BLOCK_BYTES)
    yield formats.pages.page_text(path, b"".join(blocks))


def _require_size(path: Path, size: int) -> None:
    """Raise a UserError if a file that is one document is too long for one."""
    if size > LINE_BYTES_LIMIT:
        problem = f"a document of more than {LINE_BYTES_LIMIT} bytes"
        raise UserError(path, problem, "Is it text? Cut it into documents")


def file_rows(path: Path) -> Iterator[tuple[object, Any]]:
    """The value of each row of a file of `ROW_READERS`, with its location for errors."""
    require_regular(path)
    return ROW_READERS[file_kind(path)](path, None)


def jsonl_rows(path: Path, span: Span = WHOLE) -> Iterator[tuple[Line, Any]]:
    """The value in each line of a .jsonl file, or of a span of it, with its location;
    blank lines are skipped.
    """
    for location, line in text_lines(path, span):
        if is_blank(line):
            continue
        try:
            row = json_value(line)
        except UserError as error:
            raise error.within(location) from None
        yield location, row


def json_value(line: str) -> Any:
    """The value in a line of a .jsonl file; a UserError without a place if it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        problem, fix = f"not JSON: {first_line(error)}", "correct the line"
        if line.startswith("[") and isinstance(error, ValueError):
            problem = "not one object per line, but a list over several lines"
            fix = "write each item on a line of its own"
        raise UserError((), problem, f"Each line is one object; {fix}") from None


def _list_items(path: Path, field: str | None) -> Iterator[tuple[object, Any]]:
    with reading(path), open_text(path) as file:
        yield from formats.json_files.array_items(path, file)


def _comma_rows(path: Path, field: str | None) -> Iterator[tuple[object, Any]]:
    lines = (line for _, line in text_lines(path, with_ends=True))
    return formats.csv_files.table_rows(path, lines, ",")


def _tab_rows(path: Path, field: str | None) -> Iterator[tuple[object, Any]]:
    lines = (line for _, line in text_lines(path, with_ends=True))
    return formats.csv_files.table_rows(path, lines, "\t")


# kind ─▶ (path, the one field that is needed, or None: all) ─▶ rows with their locations. A format
# is a reader and its line here.
ROW_READERS: dict[str, Callable[[Path, str | None], Iterator[tuple[object, Any]]]] = {
    ".jsonl": lambda path, field: jsonl_rows(path),
    ".json": _list_items,
    ".csv": _comma_rows,
    ".tsv": _tab_rows,
    ".parquet": lambda path, field: formats.parquet_files.parquet_rows(path, field),
}
# The kinds of which each file is one document.
PAGES = (".html", ".htm")
WHOLE_FILES = (".md", *PAGES)


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
