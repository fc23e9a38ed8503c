"""Near duplicates: texts that share most of their runs of five words (MinHash LSH).

    text ─▶ set of shingles (runs of 5 words) ─▶ signature (112,) uint32        `signature`
         ─▶ 16 bands of 7 numbers: two texts with one equal band are a candidate pair
         ─▶ pairs whose signatures agree in a share of places ─▶ clusters       `near_duplicates`

The share of equal numbers in two signatures estimates the Jaccard similarity J of the two sets, with
a standard deviation of sqrt(J (1 - J) / 112) (Broder 1997); bands find the pairs without comparing
all of them (Indyk and Motwani 1998). A pair of similarity J is a candidate with probability
1 - (1 - J^7)^16: 0.98 at J = 0.8, 0.12 at J = 0.5.
"""

from array import array
from collections.abc import Iterator

import numpy as np

from tinylm.text.shingles import ngram_hashes

SHINGLE_WORDS = 5
N_BANDS, BAND_ROWS = 16, 7
N_HASHES = N_BANDS * BAND_ROWS
# Shingles that are hashed at a time: a long document takes no more memory than this.
BLOCK = 4096
# Documents whose bands are computed at a time, and pairs that are compared at a time.
ROWS = 2**16

_random = np.random.default_rng(112)  # a fixed seed: signatures are equal on every machine
# (a x + b) mod 2^64, of which the upper half is taken: 2-universal for odd a (Dietzfelbinger 1996).
_A = _random.integers(0, 2**64, N_HASHES, dtype=np.uint64) | np.uint64(1)
_B = _random.integers(0, 2**64, N_HASHES, dtype=np.uint64)


def signature(words: np.ndarray) -> np.ndarray:
    """The smallest hash of any shingle under each of 112 hash functions, (112,) uint32.

    A text of fewer than five words is one shingle.

    Args:
        words: the hashes of the words, (W,) uint64.
    """
    shingles = np.unique(ngram_hashes(words, max(1, min(SHINGLE_WORDS, len(words)))))  # (S,)
    smallest = np.full(N_HASHES, 2**32 - 1, dtype=np.uint32)
    for start in range(0, len(shingles), BLOCK):
        block = shingles[start : start + BLOCK]
        hashed = (_A[:, None] * block + _B[:, None]) >> np.uint64(32)  # (112, S)
        np.minimum(smallest, hashed.min(axis=1).astype(np.uint32), out=smallest)
    return smallest


def similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The estimated similarity of each pair of signatures, (..., 112) and (..., 112)."""
    return (first == second).mean(axis=-1)


def near_duplicates(signatures: np.ndarray, candidates: np.ndarray, threshold: float) -> np.ndarray:
    """The first document of the cluster of near duplicates that each candidate is in, (C,);
    of a document without any, itself.

    Memory holds about 40 bytes for each document.

    Args:
        signatures: of all documents, (D, 112) uint32; may be a file that is mapped.
        candidates: the numbers of the documents to compare, ascending, (C,).
        threshold: the smallest similarity of a near duplicate.
    """
    earlier = array("q", range(len(signatures)))  # in its cluster, of each document

    def first_of(document: int) -> int:
        while (parent := earlier[document]) != document:
            earlier[document] = earlier[parent]
            document = parent
        return document

    for band in range(N_BANDS):
        for pairs in _equal_bands(signatures, candidates, band):
            alike = similarity(signatures[pairs[:, 0]], signatures[pairs[:, 1]]) >= threshold
            for a, b in pairs[alike].tolist():
                low, high = sorted((first_of(a), first_of(b)))
                earlier[high] = low
    return np.fromiter(map(first_of, candidates.tolist()), np.int64, len(candidates))


def _equal_bands(signatures: np.ndarray, candidates: np.ndarray, band: int) -> Iterator[np.ndarray]:
    """Pairs of documents with an equal band, (P, 2) at a time: in a group of equal documents, each
    with the first of them, and each with the one before it.
    """
    columns = slice(band * BAND_ROWS, (band + 1) * BAND_ROWS)
    keys = np.empty(len(candidates), dtype=np.uint64)
    for start in range(0, len(candidates), ROWS):
        rows = signatures[candidates[start : start + ROWS], columns].astype(np.uint64)
        keys[start : start + ROWS] = ngram_hashes_of_rows(rows)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    equal = np.flatnonzero(keys[1:] == keys[:-1]) + 1  # the places equal to the one before
    starts = np.ones(len(equal), dtype=bool)
    starts[1:] = equal[1:] != equal[:-1] + 1
    first = np.maximum.accumulate(np.where(starts, equal - 1, 0))
    for at in range(0, len(equal), ROWS):
        here = equal[at : at + ROWS]
        for earlier in (here - 1, first[at : at + ROWS]):
            yield np.stack((candidates[order[earlier]], candidates[order[here]]), axis=1)


def ngram_hashes_of_rows(rows: np.ndarray) -> np.ndarray:
    """One hash of each row of numbers: (D, n) uint64 to (D,)."""
    return ngram_hashes(rows.reshape(-1), rows.shape[1])[:: rows.shape[1]]
