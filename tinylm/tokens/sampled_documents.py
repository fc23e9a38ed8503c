"""Some of a run's training documents as tokens: all of them, or every n-th if they are too long.

The sample covers every source of a mixture and the whole of each file. Documents are numbered across
files, so a source with fewer than n documents may have none in it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tinylm.tokens.token_file import TokenFile

Located = tuple[str, np.ndarray]
"""where a document is, for messages, and its token ids"""


class SampledDocuments(NamedTuple):
    """Documents of at most `most` tokens together, or a single longer one."""

    sample_interval: int
    """each n-th document is chosen; 1: all"""
    documents: Iterator[Located]


def sample_rows(rows: Sequence[Located], most: int) -> SampledDocuments:
    """Rows in memory.

    >>> rows = [(f"a.jsonl:{n}", np.arange(10)) for n in range(1, 8)]
    >>> sample_interval, documents = sample_rows(rows, 30)
    >>> sample_interval, [where for where, ids in documents]
    (3, ['a.jsonl:1', 'a.jsonl:4', 'a.jsonl:7'])
    """
    lengths = [len(ids) for _, ids in rows]
    interval = _sample_interval(lambda n: sum(lengths[::n]), len(rows), most)
    return SampledDocuments(interval, iter(rows[::interval]))


def sample_files(files: Sequence[tuple[str, TokenFile]], most: int) -> SampledDocuments:
    """The documents of token files, each with the name of its source."""
    token_files = [file for _, file in files]
    n_documents = sum(len(file.document_ends) for file in token_files)

    def tokens_of(interval: int) -> int:
        if interval == 1:
            return sum(len(file) for file in token_files)
        return sum(int((stops - starts).sum()) for starts, stops in _spans(token_files, interval))

    interval = _sample_interval(tokens_of, n_documents, most)
    return SampledDocuments(interval, _documents(files, interval))


def _sample_interval(tokens_of: Callable[[int], int], n_documents: int, most: int) -> int:
    """The smallest tried interval whose documents have at most `most` tokens; else of one document.

    Args:
        tokens_of: how many tokens the documents of an interval have.
    """
    interval = max(1, math.ceil(tokens_of(1) / most))
    while interval < n_documents and tokens_of(interval) > most:
        interval += 1 + interval // 16  # in few steps also past a long first document
    return max(1, min(interval, n_documents))


def _spans(files: Sequence[TokenFile], interval: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each file, where its chosen documents start and stop, (N,) int64 each."""
    n_before = 0
    for file in files:
        ends = file.document_ends
        numbers = np.arange(-n_before % interval, len(ends), interval)
        stops = ends[numbers].astype(np.int64)
        starts = np.where(numbers > 0, ends[numbers - 1].astype(np.int64), 0)
        n_before += len(ends)
        yield starts, stops


def _documents(files: Sequence[tuple[str, TokenFile]], interval: int) -> Iterator[Located]:
    spans = _spans([file for _, file in files], interval)
    for (name, file), (starts, stops) in zip(files, spans, strict=True):
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            yield name, file.tokens[start:stop]
