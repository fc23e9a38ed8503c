"""Validation documents that the training text contains, by runs of tokens that both have.

    tokens (N,) ─▶ the hash of each run of n tokens (N - n + 1,)              `run_hashes`
    runs of the validation documents, searched for in the training tokens           `shared_documents`

Equal documents are never in both splits; nearly equal ones, quotations and books in two editions can
be. A document counts if at least half of its runs occur in training. A run has about 80 bytes of
text, 13 words. Bounded: the first 2^20 validation tokens and 2^25 training tokens are looked at,
which takes about a second.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tinylm.tokens.token_file import BLOCK, JoinedFiles, TokenFile

RUN_BYTES, LEAST_TOKENS, MOST_TOKENS = 80, 8, 100
MAX_VAL, MAX_TRAIN = 2**20, 2**25
SHARE = 0.5
# An odd multiplier has an inverse modulo 2^64, by which a run is moved to exponent 0.
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 2**64)
# Bits of the table that most training runs are rejected with.
TABLE_BITS = 24


class Shared(NamedTuple):
    """Validation documents that the training text contains."""

    found: int
    of: int
    """documents that are long enough to be compared"""
    n_tokens: int
    """of a run"""


def note_on_validation(train: Sequence[TokenFile], val: Sequence[TokenFile]) -> str | None:
    """A warning for the user if validation documents occur in the training text."""
    shared = shared_documents(train, val)
    if not shared.found:
        return None
    return (
        f"warning: {shared.found} of {shared.of} validation documents are in the training text for at "
        f"least half of their length, by runs of {shared.n_tokens} tokens; val_loss looks better than "
        "it is. python -m tinylm data clean removes near duplicates"
    )


def run_hashes(tokens: np.ndarray, n: int) -> np.ndarray:
    """The hash of each run of `n` tokens, (N - n + 1,) uint64, the difference of two sums of
    powers: P[i + n] - P[i] with P[i] = t_0 + t_1 b + ... + t_(i-1) b^(i-1) modulo 2^64.
    """
    if len(tokens) < n:
        return np.empty(0, dtype=np.uint64)
    powers = _powers(_BASE, len(tokens))
    sums = np.zeros(len(tokens) + 1, dtype=np.uint64)
    np.cumsum((tokens.astype(np.uint64) + np.uint64(1)) * powers, out=sums[1:])
    runs = (sums[n:] - sums[:-n]) * _powers(_INVERSE, len(tokens) - n + 1)
    return runs ^ (runs >> np.uint64(32))


def _powers(base: int, count: int) -> np.ndarray:
    """base^0, base^1, ... modulo 2^64, (count,)."""
    powers = np.full(count, base, dtype=np.uint64)
    powers[0] = 1
    return np.cumprod(powers)


def shared_documents(train: Sequence[TokenFile], val: Sequence[TokenFile]) -> Shared:
    """How many validation documents occur in the training tokens.

    Args:
        train: the token files of training.
        val: those of validation, of the same tokenizer.
    """
    tokens = JoinedFiles(tuple(val))[slice(0, MAX_VAL)]
    n_bytes = sum(file.header.text_bytes for file in val)
    per_token = n_bytes / max(sum(file.header.count for file in val), 1)
    n = round(min(max(RUN_BYTES / max(per_token, 0.01), LEAST_TOKENS), MOST_TOKENS))
    # 1. the runs inside each validation document: of run i the document, or -1 across a border
    ends = _ends(val, len(tokens))
    hashes = run_hashes(np.asarray(tokens), n)
    document = np.searchsorted(ends, np.arange(len(hashes)), side="right")
    last = np.searchsorted(ends, np.arange(len(hashes)) + n - 1, side="right")
    hashes, document = hashes[document == last], document[document == last]
    if not len(hashes):
        return Shared(0, 0, n)
    # 2. which of them occur in training; a table of bits rejects most of the others at once
    wanted = np.unique(hashes)
    table = np.zeros(2**TABLE_BITS, dtype=bool)
    shift = np.uint64(64 - TABLE_BITS)
    table[wanted >> shift] = True
    found = np.zeros(len(wanted), dtype=bool)
    left = MAX_TRAIN
    for file in train:
        for start in range(0, min(len(file), left), BLOCK):
            runs = run_hashes(np.asarray(file.tokens[start : start + BLOCK + n - 1]), n)
            runs = runs[table[runs >> shift]]
            places = np.searchsorted(wanted, runs) % len(wanted)
            found[places[wanted[places] == runs]] = True
        left -= min(len(file), left)
    # 3. the share of each document's runs
    is_found = found[np.searchsorted(wanted, hashes)]
    of_document = np.bincount(document)
    share = np.bincount(document, weights=is_found) / np.maximum(of_document, 1)
    return Shared(int((share >= SHARE).sum()), int((of_document > 0).sum()), n)


def _ends(files: Sequence[TokenFile], n_tokens: int) -> np.ndarray:
    """Where the documents of several files end, one file after the other, up to `n_tokens`."""
    ends: list[np.ndarray] = []
    offset = 0
    for file in files:
        ends.append(np.asarray(file.document_ends).astype(np.int64) + offset)
        offset += len(file)
    joined = np.concatenate(ends)
    return joined[joined <= n_tokens]
