r"""A corpus in chunks, for the processes that share the work on it (common/processes.py).

    TextChunk   documents that this process has already read: compressed, streamed, or only divisible by reading them
    SpanChunk   the documents of a byte range of a file: the process that works on it reads them
    RawChunk    a byte range of a .txt file, not divided into documents and cut between words: for counting words

Each has a `size` in bytes or characters, and `texts()`. A worker process imports this file, so it
needs neither torch, numpy nor pydantic. How a source is cut into chunks: `word_chunks` in
text/source_chunks.py, `source_chunks` in tokens/encode.py.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import TypeVar

from tinylm.common.errors import UserError, reading, require_regular
from tinylm.text.documents import SeparatorSeen, Span, file_documents

# Characters of the documents in a TextChunk.
CHUNK_CHARACTERS = 2**20
# A raw file is read in parts of about this many bytes, so that few words are in memory before they
# are counted.
PART_BYTES = 2**16
# Parts of a RawChunk: the work that one process does before it returns its words, and a bound on
# its memory.
PARTS_PER_CHUNK = 32
# Bytes that are searched for a place where a part can end.
WINDOW_BYTES = 2**13
# Where undecoded text can be cut without dividing a word of either pattern: after a line end or
# before a space.
BETWEEN_WORDS = re.compile(rb"(?<=[!-~]\n)(?=[!-~])|(?<=[!-~])(?= [!-~])")


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


@dataclass(frozen=True)
class RawChunk:
    """A byte range of a .txt file in parts, each from one border to the next."""

    path: Path
    borders: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.borders[-1] - self.borders[0]

    def texts(self) -> Iterator[str]:
        """The parts.

        Raises:
            UserError: the file cannot be read, or is not UTF-8.
        """
        with reading(self.path), open(self.path, "rb") as file:
            file.seek(self.borders[0])
            for start, stop in pairwise(self.borders):
                yield self._decode(file.read(stop - start), start)

    def _decode(self, raw: bytes, start: int) -> str:
        mark = 3 if start == 0 and raw.startswith(b"\xef\xbb\xbf") else 0
        try:
            text = raw[mark:].decode()
        except UnicodeDecodeError as error:
            at = mark + error.start
            raise UserError(
                self.path,
                f"not UTF-8 text: byte 0x{raw[at]:02x} at offset {start + at}",
                "Save the file as UTF-8",
            ) from None
        return text.replace("\r\n", "\n")  # as in documents, which are what is encoded later


Chunk = TypeVar("Chunk", bound=TextChunk | SpanChunk | RawChunk)


def text_chunks(
    documents: Iterable[str], found: SeparatorSeen | None = None
) -> Iterator[TextChunk]:
    """Documents in chunks of about `CHUNK_CHARACTERS`; an error in reading them is in the last chunk.

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


def raw_chunks(path: Path, processes: int = 1) -> Iterator[RawChunk]:
    """A .txt file in chunks that are cut between words; at least four for each process, if the file is long enough."""
    borders = part_borders(path)
    n_parts = len(borders) - 1
    # Four chunks per process: no process waits long for the last one.
    per_chunk = min(PARTS_PER_CHUNK, max(1, n_parts // (4 * processes)))
    for start in range(0, n_parts, per_chunk):
        yield RawChunk(path, tuple(borders[start : start + per_chunk + 1]))


def part_borders(path: Path) -> list[int]:
    """The offsets that divide a file into parts, 0 and its size included.

    A part ends at the first place between words after each `PART_BYTES`. Without one in
    `WINDOW_BYTES` it ends after a line, and without a line end it continues into the next part. The
    borders depend on the file alone, so any number of processes counts the same words.

    Raises:
        UserError: the file cannot be read, or is not a regular file.
    """
    require_regular(path)
    borders = [0]
    with reading(path), open(path, "rb") as file:
        size = os.path.getsize(path)
        for wanted in range(PART_BYTES, size, PART_BYTES):
            file.seek(wanted)
            window = file.read(WINDOW_BYTES)
            found = BETWEEN_WORDS.search(window)
            place = found.start() if found else window.find(b"\n") + 1
            if place:
                borders.append(wanted + place)
    return [*borders, size]


def limit_processes(
    chunks: Iterable[Chunk], processes: int, min_size: int
) -> tuple[Iterator[Chunk], int]:
    """The chunks, and the number of processes to use: 1 if the chunks together are smaller than `min_size`."""
    chunks = iter(chunks)
    first: list[Chunk] = []
    size = 0
    while processes > 1 and size < min_size:
        chunk = next(chunks, None)
        if chunk is None:
            break
        first.append(chunk)
        size += chunk.size
    return chain(first, chunks), processes if size >= min_size else 1
