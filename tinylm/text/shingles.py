"""Texts as hashes of their words and of runs of n words: what duplicates and contamination compare.

    text ─▶ `words_of`: lower case, without punctuation ─▶ `word_hashes` (W,) ─▶ `ngram_hashes` (W - n + 1,)

Arrays are uint64, and equal on every machine. Two different n-grams have one hash with a
probability of 2^-64.
"""

import hashlib
import re
from functools import lru_cache

import numpy as np

# Chinese and Japanese have no spaces: each of their characters is a word.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
# An odd multiplier of a polynomial in 2^64, and those of the finalizer of SplitMix64 (Steele et al. 2014).
_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def words_of(text: str) -> list[str]:
    """The words of a text in lower case.

    >>> words_of("It's 3 p.m. in 東京.")
    ['it', 's', '3', 'p', 'm', 'in', '東', '京']
    """
    return WORD.findall(text.lower())


def word_hashes(words: list[str]) -> np.ndarray:
    """The hash of each word, (W,) uint64."""
    return np.fromiter(map(_hash, words), dtype=np.uint64, count=len(words))


@lru_cache(maxsize=2**18)
def _hash(word: str) -> int:
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def ngram_hashes(words: np.ndarray, n: int) -> np.ndarray:
    """The hash of each run of `n` words, (W - n + 1,) uint64; none if there are fewer words.

    Args:
        words: the hashes of the words, (W,) uint64.
        n: the length of the runs.
    """
    n_grams = max(len(words) - n + 1, 0)
    hashes = np.zeros(n_grams, dtype=np.uint64)
    for start in range(n):  # the polynomial of n words, one word at a time for all runs at once
        hashes = hashes * _BASE + words[start : start + n_grams]
    return _mixed(hashes)


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """The hashes with every bit depending on every other: the last bits of a polynomial do not."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * _MIX[0]
    hashes = (hashes ^ (hashes >> np.uint64(27))) * _MIX[1]
    return hashes ^ (hashes >> np.uint64(31))
