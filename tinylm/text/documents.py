import gzip
import json
import os
import sys
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from tinylm.common.errors import UserError, first_line, printable, reading, require_regular

T = TypeVar("T")
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


@dataclass
class Met:
    """What was met while documents were read."""

    separator: bool = False
    """whether there was one"""


def file_documents(
    path: Path, field: str, separator: str | None, span: Span = WHOLE, met: Met | None = None
) -> Iterator[str]:
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
                raise UserError(
                    f"{line}: a line of {LINE_BYTES_LIMIT} bytes and more. Is it text? Cut it into documents."
                )
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
                raise UserError(
                    f"{place}: not UTF-8 text: byte 0x{line[error.start]:02x} at offset {at}. Save the file as UTF-8."
                ) from None
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
            pending, held = (
                [rest],
                0 if whole or len(rest) < SEARCH_CHARACTERS else SEARCH_CHARACTERS - len(rest),
            )
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
                deque(
                    text_lines(path, (start, start + len(block))), maxlen=0
                )  # raises it as well, and knows the line
                raise
            start += len(block)
            yield text if text.endswith("\n") else text.removesuffix("\r") + "\n"


def _trimmed(texts: Iterable[str]) -> Iterator[str]:
    return (text.strip("\n") for text in texts if not is_blank(text))


class _BadRow(Exception):
    """What is wrong with a row; the reader adds where it stands."""


_JSON_NAMES = {
    bool: "a boolean",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
    str: "a string",
}


def _text_of(row: Any, field: str) -> str:
    """The document in a row."""
    mend = "Correct the row, or set data.text_field to the key that holds the text."
    if not isinstance(row, dict):
        raise _BadRow(
            f'expected an object such as {{"{printable(field)}": "..."}}, found {kind_of(row)}. {mend}'
        )
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
            raise UserError(
                f"{place}: not JSON: {first_line(error)}. Each line is one object; correct the line."
            ) from None
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
            for batch in file.iter_batches(
                PARQUET_BATCH_ROWS, columns=None if field is None else [field]
            ):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{printable(path)}: row {number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{printable(path)}: damaged or cut off, or not a parquet file: {first_line(error)}. Download or write it again."
        ) from None


def _no_column(field: str, columns: Iterable[str]) -> str:
    return f"{printable(field)}: no such column; there are {some_of(columns)}. Set data.text_field to the one that holds the text."


def _import(module: str, needed_for: str) -> Any:
    """A library that `pip install tinylm` alone does not bring, imported when it is first needed."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(
            f"{printable(needed_for)}: reading it needs {module}. Install it: pip install datasets"
        ) from None


def reject_lone_surrogates(text: str) -> None:
    """Raise a UserError where `text` has half a UTF-16 pair, which no file in UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"the lone surrogate {printable(text[error.start])} at position {error.start}"
        raise UserError(
            f"the text has {found}, which is half a character. Take it out, or write the whole character."
        ) from None
