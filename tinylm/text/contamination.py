"""Evaluation rows inside training text, found by runs of words that both have.

A document is contaminated if it has 13 words in a row in common with an evaluation row, in any case
and punctuation (Brown et al. 2020, appendix C). A row of 8 to 12 words must be there whole; a
shorter one could be anything and is not compared.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from tinylm.text.shingles import ngram_hashes, word_hashes, words_of

NGRAM_WORDS, LEAST_WORDS = 13, 8


@dataclass(frozen=True)
class Overlap:
    """What a document has in common with an evaluation row."""

    row: str
    """the name of the row"""
    words: str
    """the words that both have"""


@dataclass(frozen=True)
class NgramIndex:
    """The runs of words of evaluation rows."""

    hashes: dict[int, np.ndarray]
    """of each length of runs, sorted, (N,) uint64"""
    owners: dict[int, np.ndarray]
    """the number of the row of each, (N,)"""
    names: list[str]
    n_short: int
    """rows that are too short to be compared"""

    def find(self, words: list[str], hashes: np.ndarray) -> Overlap | None:
        """The first run of words of a document that is in a row; None if there is none.

        Args:
            words: of the document.
            hashes: of these words, (W,) uint64.
        """
        for n, starts, places in self._matches(hashes):
            row = self.names[self.owners[n][places[0]]]
            return Overlap(row, " ".join(words[starts[0] : starts[0] + n]))
        return None

    def rows_in(self, hashes: np.ndarray) -> set[str]:
        """The names of all rows that have a run of words in common with a document.

        Args:
            hashes: of the words of the document, (W,) uint64.
        """
        names: set[str] = set()
        for n, _, places in self._matches(hashes):
            runs = np.unique(self.hashes[n][places])
            first = np.searchsorted(self.hashes[n], runs, side="left")
            end = np.searchsorted(self.hashes[n], runs, side="right")  # several rows may have a run
            for start, stop in zip(first.tolist(), end.tolist(), strict=True):
                names |= {self.names[owner] for owner in self.owners[n][start:stop]}
        return names

    def _matches(self, hashes: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """For each length n of runs that a document has in common with the rows: n, where they begin
        in the document, and their places in `hashes[n]`.
        """
        for n, known in self.hashes.items():
            grams = ngram_hashes(hashes, n)
            if not len(grams):
                continue
            places = np.searchsorted(known, grams) % len(known)
            starts = np.flatnonzero(known[places] == grams)
            if len(starts):
                yield n, starts, places[starts]


def ngram_index(rows: Iterable[tuple[str, str]]) -> NgramIndex:
    """The index of rows, each a name and a text; memory holds 16 bytes for each of their words."""
    hashes: dict[int, list[np.ndarray]] = {}
    owners: dict[int, list[np.ndarray]] = {}
    names: list[str] = []
    n_short = 0
    for name, text in rows:
        words = words_of(text)
        n = min(len(words), NGRAM_WORDS)
        if n < LEAST_WORDS:
            n_short += 1
            continue
        grams = ngram_hashes(word_hashes(words), n)
        hashes.setdefault(n, []).append(grams)
        owners.setdefault(n, []).append(np.full(len(grams), len(names)))
        names.append(name)
    made: dict[int, np.ndarray] = {}
    made_owners: dict[int, np.ndarray] = {}
    for n in sorted(hashes, reverse=True):
        joined = np.concatenate(hashes[n])
        order = np.argsort(joined, kind="stable")
        made[n], made_owners[n] = joined[order], np.concatenate(owners[n])[order]
    return NgramIndex(made, made_owners, names, n_short)
