"""Some of a run's training documents as tokens: all of them, or every n-th if they are too long.

Evenly chosen documents are of every source of a mixture, and of the end of a file as of its start.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tinylm.tokens.token_file import TokenFile

Located = tuple[str, np.ndarray]
"""where a document is, for messages, and its token ids"""


class SampledDocuments(NamedTuple):
    """Documents of about `most` tokens together."""

    every: int
    """each n-th document is chosen; 1: all"""
    documents: Iterator[Located]


def sample_rows(rows: Sequence[Located], most: int) -> SampledDocuments:
    """Rows in memory.

    >>> rows = [(f"a.jsonl:{n}", np.arange(10)) for n in range(1, 8)]
    >>> every, documents = sample_rows(rows, 30)
    >>> every, [where for where, ids in documents]
    (3, ['a.jsonl:1', 'a.jsonl:4', 'a.jsonl:7'])
    """
    every = _every(sum(len(ids) for _, ids in rows), most)
    return SampledDocuments(every, iter(rows[::every]))


def sample_files(files: Sequence[tuple[str, TokenFile]], most: int) -> SampledDocuments:
    """The documents of token files, each with the name of its source."""
    every = _every(sum(len(file) for _, file in files), most)
    return SampledDocuments(every, _documents(files, every))


def _every(n_tokens: int, most: int) -> int:
    return max(1, math.ceil(n_tokens / most))


def _documents(files: Sequence[tuple[str, TokenFile]], every: int) -> Iterator[Located]:
    for name, file in files:
        ends = file.document_ends
        for number in range(0, len(ends), every):
            start = int(ends[number - 1]) if number else 0
            yield name, file.tokens[start : int(ends[number])]
