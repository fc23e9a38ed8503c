"""A corpus in portions, for processes that share the work on it (processes.py).

    TextJob   documents that this process has read already: compressed, streamed, or divided so that only reading tells
    SpanJob   the documents of a span of a file: whoever works on it reads them
    PartJob   a .txt file as it stands, in parts that are cut where no word is: what words are counted in

All of them have a `size` in bytes or characters and give `texts`. This file imports little on purpose, as words.py does: a
counting process loads it. How sources are cut is told where they are: `jobs_of` in encode.py and in bpe.py.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tinylm.common.errors import UserError, printable, reading

if TYPE_CHECKING:
    from tinylm.text.documents import Met, Span


# Documents that were read already go to the processes in so many characters.
JOB_CHARACTERS = 2**20


@dataclass(frozen=True)
class TextJob:
    """Documents that were read already, and the error that ended the reading."""

    documents: list[str]
    error: UserError | None = None
    separated: bool = False
    """whether a separator was met up to here"""

    @property
    def size(self) -> int:
        return sum(map(len, self.documents))

    def texts(self, met: "Met | None" = None) -> Iterator[str]:
        """The documents, then the error; `met` is told of separators."""
        if met is not None:
            met.separator |= self.separated
        yield from self.documents
        if self.error is not None:
            raise self.error


@dataclass(frozen=True)
class SpanJob:
    """A span of a document file."""

    path: Path
    field: str
    separator: str | None
    span: "Span"

    @property
    def size(self) -> int:
        return self.span[1] - self.span[0]

    def texts(self, met: "Met | None" = None) -> Iterator[str]:
        """The documents; `met` is told of separators."""
        from tinylm.text.documents import (
            file_documents,
        )  # here, because a process that counts words shall not load it

        return file_documents(self.path, self.field, self.separator, self.span, met)


@dataclass(frozen=True)
class PartJob:
    """Parts of a .txt file, from one border to the next."""

    path: Path
    borders: tuple[int, ...]

    @property
    def size(self) -> int:
        return self.borders[-1] - self.borders[0]

    def texts(self) -> Iterator[str]:
        """The parts."""
        with reading(self.path), open(self.path, "rb") as file:
            file.seek(self.borders[0])
            for start, stop in zip(self.borders, self.borders[1:], strict=False):
                yield self._text(file.read(stop - start), start)

    def _text(self, raw: bytes, start: int) -> str:
        mark = 3 if start == 0 and raw.startswith(b"\xef\xbb\xbf") else 0
        try:
            return raw[mark:].decode().replace("\r\n", "\n")  # as in the documents that are encoded
        except UnicodeDecodeError as error:
            at = start + mark + error.start
            raise UserError(
                f"{printable(self.path)}: not UTF-8 text: byte 0x{raw[at - start]:02x} at offset {at}. Save the file as UTF-8."
            ) from None


Job = TypeVar("Job", bound=TextJob | SpanJob | PartJob)


def text_jobs(documents: Iterable[str], met: "Met | None" = None) -> Iterator[TextJob]:
    """Documents in portions, and an error in reading them as the last of these; `met` is what their reader tells of separators."""
    texts: list[str] = []
    held = 0
    error = None
    try:
        for text in documents:
            texts.append(text)
            held += len(text)
            if held >= JOB_CHARACTERS:
                yield TextJob(texts, None, met is not None and met.separator)
                texts, held = [], 0
    except UserError as problem:
        error = problem
    if texts or error is not None:
        yield TextJob(texts, error, met is not None and met.separator)


def worth_processes(jobs: Iterable[Job], processes: int, least: int) -> tuple[Iterator[Job], int]:
    """The jobs, and how many processes to share them out to: one where they are smaller than `least` together."""
    jobs, first, size = iter(jobs), [], 0
    while processes > 1 and size < least and (job := next(jobs, None)) is not None:
        first.append(job)
        size += job.size
    return chain(first, jobs), processes if size >= least else 1
