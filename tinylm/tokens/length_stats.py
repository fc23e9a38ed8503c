"""What is in a corpus: documents, characters, tokens, and which context its documents fit in.

chunk ─▶ lengths in tokens, characters, languages   `measure_chunk`, by several processes
     ─▶ Measures of all documents                   `measure_corpus`
     ─▶ one `Fit` for each possible seq_len         `fits`
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from tinylm.common.console import OnProgress
from tinylm.common.errors import UserError
from tinylm.common.processes import in_order
from tinylm.text.documents import SpanChunk, TextChunk
from tinylm.text.scripts import language_of
from tinylm.text.sources import TextSource
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.encode import WORTH_PROCESSES, encode_batches

SMALLEST_SEQ_LEN = 64
# The share of documents that the recommended seq_len takes whole.
RECOMMENDED_SHARE = 0.95


@dataclass
class Measures:
    """The documents of a chunk, or of a corpus."""

    lengths: np.ndarray
    """tokens of each document with its EOS, (D,) uint32"""
    characters: Counter[str]
    """how often each occurs"""
    languages: Counter[str]
    """documents by the guessed language"""
    n_bytes: int
    size: int = 0
    error: UserError | None = None


@dataclass(frozen=True)
class Fit:
    """What a seq_len does to the documents; shares from 0 to 1."""

    seq_len: int
    whole: float
    """documents that fit"""
    cut: float
    """tokens after the first seq_len of their document: lost if documents are truncated, at the start
    of another row if they are packed"""
    padding: float
    """places that are empty if each row has one document"""


def measure_chunk(chunk: SpanChunk | TextChunk, *, tokenizer: Tokenizer) -> Measures:
    """The documents of a chunk up to the first that cannot be read; each process does this."""
    texts: list[str] = []
    error = None
    lengths = [np.empty(0, dtype=np.uint32)]
    try:
        texts.extend(chunk.texts())
    except UserError as problem:
        error = problem
    try:
        for _, ends in encode_batches(texts, tokenizer, None):
            lengths.append(np.diff(ends, prepend=0).astype(np.uint32))
    except UserError as problem:
        error = problem
    characters: Counter[str] = Counter()
    for text in texts:
        characters.update(text)
    n_bytes = sum(len(text.encode()) for text in texts)
    languages = Counter(map(language_of, texts))
    return Measures(np.concatenate(lengths), characters, languages, n_bytes, chunk.size, error)


def measure_corpus(
    source: TextSource,
    tokenizer: Tokenizer,
    *,
    docs: int | None = None,
    processes: int = 1,
    on_progress: OnProgress | None = None,
) -> Measures:
    """All documents of a source, or those of the first chunks that have at least `docs` documents.
    Memory holds 4 bytes for each document, and a few chunks.

    Raises:
        UserError: a document cannot be read or encoded.
    """
    measured = Measures(np.empty(0, dtype=np.uint32), Counter(), Counter(), 0)
    lengths: list[np.ndarray] = []
    n_documents = 0
    total = 0 if on_progress is None else source.size()
    work = partial(measure_chunk, tokenizer=tokenizer)
    for chunk in in_order(work, source.chunks(), processes, min_size=WORTH_PROCESSES):
        if chunk.error is not None:
            raise chunk.error
        lengths.append(chunk.lengths)
        n_documents += len(chunk.lengths)
        measured.characters.update(chunk.characters)
        measured.languages.update(chunk.languages)
        measured.n_bytes += chunk.n_bytes
        measured.size += chunk.size
        if on_progress is not None:
            on_progress("reading, bytes", measured.size, total)
        if docs is not None and n_documents >= docs:
            break
    measured.lengths = np.concatenate(lengths or [measured.lengths])
    return measured


def fits(lengths: np.ndarray) -> Iterator[Fit]:
    """The powers of two from 64 to the first that takes every document, (D,) at least one.

    >>> [(fit.seq_len, fit.whole, round(fit.cut, 3), fit.padding) for fit in fits(np.array([64, 96]))]
    [(64, 0.5, 0.2, 0.0), (128, 1.0, 0.0, 0.375)]
    """
    total = int(lengths.sum(dtype=np.int64))
    seq_len = SMALLEST_SEQ_LEN
    while True:
        held = int(np.minimum(lengths, seq_len).sum(dtype=np.int64))
        whole = float((lengths <= seq_len).mean())
        yield Fit(seq_len, whole, 1 - held / total, 1 - held / (seq_len * len(lengths)))
        if whole == 1:
            return
        seq_len *= 2


def recommended(lengths: np.ndarray) -> int:
    """The smallest power of two that takes 95% of the documents whole."""
    return next(fit.seq_len for fit in fits(lengths) if fit.whole >= RECOMMENDED_SHARE)


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Documents and tokens by length: (longest length of the bin, documents, tokens), in powers of two.

    >>> histogram(np.array([3, 4, 5, 70]))
    [(4, 2, 7), (8, 1, 5), (128, 1, 70)]
    """
    bins = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    found = []
    for power in np.unique(bins).tolist():
        inside = lengths[bins == power]
        found.append((2**power, len(inside), int(inside.sum(dtype=np.int64))))
    return found
