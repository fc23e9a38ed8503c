r"""A source in chunks that cut no word, for the processes
that count its words (common/processes.py).

    TextChunk   whole documents that this process has read, in text/documents.py
    RawChunk    a byte range of a .txt file, not divided into documents and cut between words

A worker process imports this file, so it needs neither torch, numpy nor pydantic.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

from tinylm.common.errors import UserError
from tinylm.common.files import open_regular, reading, require_regular
from tinylm.text.documents import TextChunk, end_of_document, file_documents, file_kind, text_chunks
from tinylm.text.named_sources import Together
from tinylm.text.sources import LocalFiles, TextSource

# A raw file is read in parts of about this many bytes, so that few words are in memory before they
# are counted.
PART_BYTES = 2**16
# Parts of a RawChunk: the work that one process does before it returns its words, and a bound on
# its memory.
PARTS_PER_CHUNK = 32
# Bytes that are searched for a place where a part can end.
WINDOW_BYTES = 2**13
# Where undecoded text can be cut without dividing a word of a named pattern: after a line end or
# before a space. A custom regular expression may match across such a cut: at most one word per
# part is affected.
BETWEEN_WORDS = re.compile(rb"(?<=[!-~]\n)(?=[!-~])|(?<=[!-~])(?= [!-~])")


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
        with reading(self.path), open_regular(self.path) as file:
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


def word_chunks(
    source: TextSource, processes: int = 1, docs: int | None = None
) -> Iterator[RawChunk | TextChunk]:
    """The source, or its first `docs` documents, in chunks that cut no word.

    A .txt file without a separator that is not compressed is read as it is, in `raw_chunks`;
    everything else by its documents.
    """
    if docs is not None or not isinstance(source, LocalFiles | Together):
        yield from text_chunks(islice(source.documents(), docs))
        return
    if isinstance(source, Together):
        for one in source.sources:
            yield from word_chunks(one, processes)
        return
    for path in source.paths:
        is_lines = source.separator is None and file_kind(path) == ".txt"
        if is_lines and end_of_document(path, None) is not None:
            yield from raw_chunks(path, processes)
        else:
            yield from text_chunks(file_documents(path, source.field, source.separator))


def raw_chunks(path: Path, processes: int = 1) -> Iterator[RawChunk]:
    """A .txt file in chunks that are cut between words; at least four for each process,
    if the file is long enough.
    """
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
    with reading(path), open_regular(path) as file:
        size = os.path.getsize(path)
        for wanted in range(PART_BYTES, size, PART_BYTES):
            file.seek(wanted)
            window = file.read(WINDOW_BYTES)
            found = BETWEEN_WORDS.search(window)
            place = found.start() if found else window.find(b"\n") + 1
            if place:
                borders.append(wanted + place)
    return [*borders, size]
