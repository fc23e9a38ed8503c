"""tiktoken in place of `tokenizers`: the same ids several times as fast,
if both are known to agree.

`tokenizers` joins a pair of tokens if the vocabulary's file has a merge for the pair; the first
merge in the file comes first. tiktoken knows no merges: it joins two neighbors if their bytes
together are a token; the token of lowest rank comes first. Give tiktoken only the tokens that
`tokenizers` makes of their own bytes, ranked by their merges. Then both agree at every step.
Suppose tiktoken joins A and B to the token T. Nothing was joined across the ends of T so far, so
inside its bytes both did what `tokenizers` does to these bytes alone. There, A and B are joined to
T next, so the two have a merge. And a token that `tokenizers` does not make of its own bytes is
made nowhere.

Both must also split a text into the same words. This is known for `PATTERNS`, the patterns of GPT-2
and GPT-4.
"""

from collections.abc import Collection
from itertools import pairwise
from typing import Any

import numpy as np

from tinylm.tokenizer.pretokenize import BYTE_OF_CHARACTER, PATTERNS, byte_level_pattern

# tiktoken searches a text for special tokens first. With none it looks at every place (12 MB/s
# instead of 19).
NEVER_USED = "\0\0\0"


class TiktokenEncoder:
    """A tiktoken encoding of `tokens`, in the order of their merges, and the id of each."""

    def __init__(self, pattern: str, tokens: Collection[bytes], ids: Collection[int]):
        import tiktoken

        ranks = {token: rank for rank, token in enumerate(tokens)}
        self.encoding = tiktoken.Encoding(
            "tinylm",
            pat_str=pattern,
            mergeable_ranks=ranks,
            special_tokens={NEVER_USED: len(ranks)},
        )
        self.ids = np.fromiter(ids, dtype=np.uint32, count=len(ranks))

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, on one thread.

        Raises:
            ValueError: tiktoken's regex engine gave up, as it does at a million spaces in a row.
        """
        return self.ids[self.encoding.encode_to_numpy(text, disallowed_special=())]


def build_tiktoken_encoder(
    description: dict[str, Any], never: Collection[int]
) -> TiktokenEncoder | None:
    """The tiktoken encoder of a tokenizer; None if its ids could differ.

    Args:
        description: the tokenizer.json of the tokenizer.
        never: ids that no text may be encoded to.
    """
    pattern, model = find_pattern(description), description["model"]
    if pattern is None or model["dropout"]:
        return None
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        return None
    vocabulary = model["vocab"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokens = _rank_tokens(vocabulary, merges, whole_words=model["ignore_merges"])
    if tokens is None or any(vocabulary[token] in never for token in tokens):
        return None
    return TiktokenEncoder(
        pattern,
        [b"".join(BYTE_OF_CHARACTER[character] for character in token) for token in tokens],
        [vocabulary[token] for token in tokens],
    )


def find_pattern(description: dict[str, Any]) -> str | None:
    """The pattern of a byte-level BPE tokenizer's words; None if it is unknown,
    or if the text is changed before.
    """
    if description["model"]["type"] != "BPE" or description["normalizer"] is not None:
        return None
    pattern = byte_level_pattern(description["pre_tokenizer"])
    return pattern if pattern in PATTERNS.values() else None


def _rank_tokens(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], *, whole_words: bool
) -> list[str] | None:
    """The tokens that text is encoded to: the 256 bytes, then by their merges.
    None if tiktoken's could differ.

    Args:
        vocabulary: tokens in visible form, and their ids.
        merges: the pairs in their order.
        whole_words: a word that is a token needs no merges (`ignore_merges`).
    """
    from tokenizers import models

    # A token with several merges, as in converted tiktoken files, has one rank if these follow one
    # another.
    results = [left + right for left, right in merges]
    in_order = [result for before, result in pairwise(["", *results]) if before != result]
    n_distinct = len({*BYTE_OF_CHARACTER, *in_order})
    if not vocabulary.keys() >= BYTE_OF_CHARACTER.keys() or n_distinct < 256 + len(in_order):
        return None
    # Into how many tokens `tokenizers` encodes the bytes of each token.
    backend = models.BPE(vocabulary, merges)
    n_parts = {
        token: len(backend.tokenize(token))
        for token in vocabulary
        if BYTE_OF_CHARACTER.keys() >= set(token)
    }
    tokens = [*BYTE_OF_CHARACTER, *(token for token in in_order if n_parts.get(token) == 1)]
    if whole_words:
        # tiktoken looks up whole words too. It would also join two tokens to such a word inside a
        # longer one.
        if 2 in n_parts.values():
            return None
        tokens += [token for token, n in n_parts.items() if n > 2]
    return tokens
