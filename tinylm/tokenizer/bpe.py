r"""Byte-pair encoding (BPE), the version to read: learn merges from text,
encode and decode with them.

BPE (Sennrich et al. 2016; on bytes, Radford et al. 2019) begins with the 256 bytes, so it can write
any text, and makes the most frequent pair of neighboring tokens a new token, again and again.
`low low low lower` has the words `low` once, `·low` twice and `·lower` once (· is the space, which
belongs to the word after it):

    merge             new id  low    ·low     ·lower       why this pair
    -                         l o w  · l o w  · l o w e r  the bytes
    (o, w) -> ow        256   l ow   · l ow   · l ow e r   o w and l o occur 4 times: greater bytes win
    (l, ow) -> low      257   low    · low    · low e r    4 times; (·, l) 3 times
    (·, low) -> ·low    258   low    ·low     ·low e r     3 times

The merges, in this order, are the whole result of training. A token's id is its byte, or 256 plus
the number of its merge. A new text is encoded by the same merges in the same order, so `slow`
shares a token with `low`, and a word that no merge fits stays bytes: there is no unknown word.

    train     texts -> merges               count_words, then merge by merge
    encode    text, merges -> ids
    decode    ids, merges -> text

Words come from pretokenize.py: no merge crosses the border of a word. Special tokens such as
<|endoftext|> have ids after the last merge; no text is ever encoded to one, so they do not appear
here. bpe_fast.py finds the same merges 50 times as fast (130 KB of text, 244 merges; more on larger
ones), tiktoken_encoder.py the same ids; the tests hold them equal.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

from tinylm.tokenizer.pretokenize import Pretokenizer, count_words

Merge = tuple[bytes, bytes]


def train(
    texts: Iterable[str], n_merges: int, pretokenizer: Pretokenizer | None = None
) -> list[Merge]:
    """The first `n_merges` merges for these texts; fewer if every word is one token before.

    Each merge is the most frequent pair at its time; among equally frequent pairs the greatest in
    the order of bytes.

    >>> train(["low low low lower"], 3)
    [(b'o', b'w'), (b'l', b'ow'), (b' ', b'low')]

    The example of Wikipedia's article on BPE: `aa` occurs 4 times (`aaa` has it twice). Then `aa a`
    and `a b` occur 2 times, and `aa` is greater than `a`. Then `aaa b` occurs 2 times, everything
    else once.

    >>> train(["aaabdaaabac"], 3)
    [(b'a', b'a'), (b'aa', b'a'), (b'aaa', b'b')]
    """
    # No merge crosses a word, so pairs can be counted in distinct words:
    # {"low": 1, " low": 2, " lower": 1}
    word_counts = count_words(texts, pretokenizer or Pretokenizer())
    # Every word begins as its bytes: {"low": [b"l", b"o", b"w"], ...}
    tokens_of = {word: split_bytes(word) for word in word_counts}
    merges: list[Merge] = []
    while len(merges) < n_merges:
        # Count all pairs of neighbors, each as often as its word occurs: {(b"o", b"w"): 4, ...}
        counts: Counter[Merge] = Counter()
        for word, tokens in tokens_of.items():
            for pair in pairwise(tokens):
                counts[pair] += word_counts[word]
        # No pair is left when every word is one token.
        if not counts:
            break
        # The most frequent pair becomes a token. The tie-break on bytes makes the order of the
        # texts irrelevant.
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        # Replace the pair in every word.
        tokens_of = {word: merge(tokens, best) for word, tokens in tokens_of.items()}
    return merges


def encode(text: str, merges: Sequence[Merge], pattern: str = "gpt2") -> list[int]:
    """The ids of a text: in each word, the merge that was learned first is made first.

    >>> merges = [(b"o", b"w"), (b"l", b"ow"), (b" ", b"low")]      # ids 256, 257, 258
    >>> encode("low lower slow", merges)      # low | ·low e r | · s low
    [257, 258, 101, 114, 32, 115, 257]
    >>> encode("né", merges)      # é has no token: its two bytes
    [110, 195, 169]
    """
    rank = {pair: number for number, pair in enumerate(merges)}  # {(b"o", b"w"): 0, ...}
    id_of = {token: id for id, token in enumerate(vocabulary(merges))}
    ids: list[int] = []
    # No special tokens: a text that spells one is split like any other text.
    for word in Pretokenizer(pattern, special_tokens=()).split(text):
        # A word begins as its bytes; " lower": [b" ", b"l", b"o", b"w", b"e", b"r"]
        tokens = split_bytes(word)
        while True:
            # Of all pairs that have a merge, make the merge that was learned first.
            known = [pair for pair in pairwise(tokens) if pair in rank]
            if not known:
                break
            tokens = merge(tokens, min(known, key=lambda pair: rank[pair]))
        # No merge fits any more; " lower": [b" low", b"e", b"r"]
        ids += [id_of[token] for token in tokens]
    return ids


def decode(ids: Iterable[int], merges: Sequence[Merge]) -> str:
    """The text of `ids`; bytes that are not UTF-8, such as half a character, become U+FFFD.

    >>> decode([257, 258, 101, 114], [(b"o", b"w"), (b"l", b"ow"), (b" ", b"low")])
    'low lower'
    """
    tokens = vocabulary(merges)
    return b"".join(tokens[id] for id in ids).decode("utf-8", errors="replace")


def vocabulary(merges: Iterable[Merge]) -> list[bytes]:
    """The bytes of each token, by id: the 256 bytes, then the result of each merge."""
    return [bytes([byte]) for byte in range(256)] + [left + right for left, right in merges]


def split_bytes(word: str) -> list[bytes]:
    """A word as one token per byte.

    >>> split_bytes("né")
    [b'n', b'\\xc3', b'\\xa9']
    """
    return [bytes([byte]) for byte in word.encode()]


def merge(tokens: Sequence[bytes], pair: Merge) -> list[bytes]:
    """The tokens with each `pair` of neighbors joined, from left to right.

    >>> merge([b"a", b"a", b"a", b"b"], (b"a", b"a"))
    [b'aa', b'a', b'b']
    """
    merged: list[bytes] = []
    for token in tokens:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged
