"""How well a tokenizer fits a text."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tinylm.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class TokenizerFit:
    """Counts over the texts that a tokenizer encoded."""

    n_bytes: int
    n_tokens: int
    n_used: int
    """different tokens that occur"""
    longest: list[int]
    """the ids of the longest of them in bytes, longest first"""


def measure_fit(tokenizer: Tokenizer, texts: Iterable[str], *, n_longest: int = 3) -> TokenizerFit:
    """Encode each text and count bytes and tokens."""
    n_bytes = 0
    uses = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for text in texts:
        n_bytes += len(text.encode())
        uses += np.bincount(tokenizer.encode_arrays([text])[0], minlength=len(uses))
    lengths = tokenizer.byte_lengths()
    used = sorted(np.flatnonzero(uses).tolist(), key=lambda id: -lengths[id])
    return TokenizerFit(n_bytes, int(uses.sum()), len(used), used[:n_longest])
