"""The same ids, several times as fast: tiktoken in the place of `tokenizers`, for tokenizers of which both make the same.

`tokenizers` joins a pair of tokens where the vocabulary's file has a merge for that pair, the first merge of the file first.
tiktoken knows no merges: it joins any two neighbours whose bytes together are a token, the token of the lowest rank first. Take
the tokens that `tokenizers` makes of their own bytes, ranked by their merges, and leave all others out; then both do the same
at every step. For let tiktoken join A and B to the token T. Inside the bytes of T both had done, so far, what `tokenizers`
does to these bytes alone, because nothing was joined across their ends. There it goes on from A and B to T, so it has a merge
for the two. And a token that it does not make of its own bytes it makes nowhere.

What remains is to split a text into the same words, which is known for `PATTERNS`, GPT-2's and GPT-4's.
"""

from collections.abc import Collection
from itertools import pairwise
from typing import Any

import numpy as np

from tinylm.tokenizer.pretokenize import BYTE_OF_CHARACTER, PATTERNS

# tiktoken searches a text for special tokens before all else. With none it looks at every place (12 MB/s instead of 19).
NEVER_USED = "\0\0\0"


class FastBpe:
    """A tiktoken encoder of tokens in the order of their merges, and the id of each."""

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


def fast_bpe(description: dict[str, Any], never: Collection[int]) -> FastBpe | None:
    """The fast encoder of a tokenizer, None where its ids could differ.

    Args:
        description: the tokenizer.json of a byte-level BPE tokenizer.
        never: ids that no text may become.
    """
    pattern, model = word_pattern(description), description["model"]
    if (
        pattern is None
        or model["dropout"]
        or model["continuing_subword_prefix"]
        or model["end_of_word_suffix"]
    ):
        return None
    vocabulary = model["vocab"]
    ranked = _ranked(
        vocabulary, [tuple(pair) for pair in model["merges"]], whole_words=model["ignore_merges"]
    )
    if ranked is None or any(vocabulary[token] in never for token in ranked):
        return None
    return FastBpe(
        pattern,
        [b"".join(map(BYTE_OF_CHARACTER.__getitem__, token)) for token in ranked],
        [vocabulary[token] for token in ranked],
    )


def word_pattern(description: dict[str, Any]) -> str | None:
    """The pattern of the words in which a byte-level BPE tokenizer joins bytes; None where it is not known, or text is changed before."""
    if description["model"]["type"] != "BPE" or description["normalizer"] is not None:
        return None
    match description["pre_tokenizer"]:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return PATTERNS["gpt2"]
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        } if pattern in PATTERNS.values():
            return pattern
    return None


def _ranked(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], *, whole_words: bool
) -> list[str] | None:
    """The tokens that come out of text: the 256 bytes, the others in the order of their merges. None where tiktoken's could differ.

    Args:
        vocabulary: tokens in printable form, and their ids.
        merges: the pairs in their order.
        whole_words: a word that is a token is not looked up in the merges (`ignore_merges`).
    """
    from tokenizers import models

    results = [left + right for left, right in merges]
    # A token with several merges, as converted tiktoken files have them, has one rank if these stand together.
    in_order = [result for before, result in pairwise(["", *results]) if before != result]
    if not vocabulary.keys() >= BYTE_OF_CHARACTER.keys() or len(
        {*BYTE_OF_CHARACTER, *in_order}
    ) < 256 + len(in_order):
        return None
    alone = models.BPE(vocabulary, merges)
    parts = {
        token: len(alone.tokenize(token))
        for token in vocabulary
        if BYTE_OF_CHARACTER.keys() >= set(token)
    }
    ranked = [*BYTE_OF_CHARACTER, *(token for token in in_order if parts.get(token) == 1)]
    if whole_words:
        # tiktoken looks whole words up too. It would also join two tokens to such a word where `tokenizers` has no merge for them.
        if 2 in parts.values():
            return None
        ranked += [token for token, n in parts.items() if n > 2]
    return ranked
