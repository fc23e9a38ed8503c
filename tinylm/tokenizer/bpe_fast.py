r"""The merges of bpe.py's `train`, fast: for corpora of gigabytes
and vocabularies of 100,000 tokens.

    1. words   chunks of a corpus -> {word: how often it occurs}, by several processes  `count_words_of`
    2. merges  the most frequent pair becomes a token, again and again                  `WordTable`, `merge_pairs`

Read bpe.py first: it defines the result. Four things make this file fast. Pairs are counted in
distinct words. All words lie in one array, where a merge touches the positions of its pair and
nothing else. A heap finds the most frequent pair without counting the others again. Pairs that are
too rare to be merged soon are not in the heap. The result depends on the text alone, never on the
number of processes.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from tinylm.common.console import OnProgress
from tinylm.common.errors import UserError
from tinylm.common.processes import in_order
from tinylm.text.chunks import RawChunk
from tinylm.text.documents import TextChunk
from tinylm.tokenizer.bpe_files import Bpe, check_request, smallest_vocabulary
from tinylm.tokenizer.pretokenize import Pretokenizer, count_chunk

# A smaller text is counted before a second process has started (half a second; one core counts 10
# MB in 0.8 s).
MIN_SIZE_FOR_PROCESSES = 2**24
# In `WordTable.tokens`: between words, and where a token began that is now inside a longer one.
NONE = -1
# Separates words in their bytes; UTF-8 never has it.
SEPARATOR = 0xFF
# The heap holds the pairs that are at most this many times rarer than the most frequent one was
# when it was filled.
RARER = 16
# The table is searched for pairs in this many passes, so that each needs little memory.
PASSES = 8


def learn_bpe(
    chunks: Iterable[RawChunk | TextChunk],
    vocab_size: int,
    pretokenizer: Pretokenizer,
    *,
    processes: int = 1,
    n_bytes: int = 0,
    on_progress: OnProgress | None = None,
) -> Bpe:
    """A vocabulary of `vocab_size` tokens learned from a corpus;
    it is smaller if the words allow no more merges.

    Args:
        chunks: the text of the corpus.
        vocab_size: tokens, with the bytes and the special tokens.
        pretokenizer: splits text into words.
        processes: number of processes that count words.
        n_bytes: bytes of all chunks, for the progress; 0 if not known.
        on_progress: called with the bytes that are counted, then with the merges.

    Raises:
        UserError: as `check_request` and `count_words_of`.
    """
    check_request(vocab_size, pretokenizer)
    n_merges = vocab_size - smallest_vocabulary(pretokenizer)
    # The counts are not kept: a large corpus has tens of millions of distinct words.
    table = WordTable(
        count_words_of(
            chunks, pretokenizer, processes=processes, n_bytes=n_bytes, on_progress=on_progress
        ),
        256 + n_merges,
    )
    return Bpe(tuple(merge_pairs(table, n_merges, on_progress=on_progress)), pretokenizer)


def count_words_of(
    chunks: Iterable[RawChunk | TextChunk],
    pretokenizer: Pretokenizer,
    *,
    processes: int = 1,
    n_bytes: int = 0,
    on_progress: OnProgress | None = None,
) -> Counter[str]:
    """How often each word occurs in the chunks, counted by `processes`,
    or by this one alone if the text is small.

    Raises:
        UserError: a file cannot be read or is not UTF-8, a process was killed,
            or there are no words.
    """
    total: Counter[str] = Counter()
    n_done = 0
    count = partial(count_chunk, pretokenizer)
    for size, words in in_order(count, chunks, processes, min_size=MIN_SIZE_FOR_PROCESSES):
        total.update(words)
        n_done += size
        if on_progress is not None:
            on_progress("tokenizer: counting words, bytes", n_done, n_bytes)
    if not total:
        raise UserError("tokenizer", "the text has no words to learn from", "Give a file with text")
    return total


@dataclass(frozen=True, slots=True)
class TokenPair:
    """Two neighboring tokens: how often, and where."""

    left: int
    right: int
    count: int
    positions: np.ndarray


class WordTable:
    """All distinct words, one after another, as tokens that grow.

    `low` (3 times) and `lower` (once) after the merge `o w`, whose token is 256. A token is written
    at its first and at its last byte, so that both of its neighbors find it:

        position   0   1   2   3   4   5   6   7   8   9  10
        bytes      .   l   o   w   .   l   o   w   e   r   .
        tokens     .   l 256 256   .   l 256 256   e   r   .      (. is NONE)
        starts         1   1           1   1       1   1          (a token starts here)
        counts         3   3   3       1   1   1   1   1          (how often the word occurs)

    A pair is at the position of its left token: `o w` was at 2 and at 6.
    """

    def __init__(self, word_counts: Mapping[str, int], vocab_size: int):
        raw = bytearray((SEPARATOR,))
        for word in word_counts:
            raw += word.encode()
            raw.append(SEPARATOR)
        self.tokens = np.frombuffer(raw, dtype=np.uint8).astype(np.int32)
        self.starts = self.tokens != SEPARATOR
        separators = np.flatnonzero(~self.starts)
        self.tokens[separators] = NONE
        counts = np.fromiter(word_counts.values(), dtype=np.int64, count=len(word_counts))
        counts = counts.astype(np.min_scalar_type(counts.max(initial=0)))
        self.counts = np.concatenate([counts[:1], np.repeat(counts, np.diff(separators))])
        # Each merge leaves one token less, so there are never more new tokens than bytes.
        self.sizes = np.ones(min(vocab_size, 256 + len(raw)), dtype=np.int32)
        """bytes of each token"""

    def pairs(self, min_count: int = 1) -> Iterator[TokenPair]:
        """The pairs that occur at least `min_count` times."""
        n = len(self.sizes)
        for number in range(PASSES):
            # The left tokens of this pass, and the token that starts after each.
            here = self.starts & (self.tokens % PASSES == number)
            positions = np.flatnonzero(here).astype(np.int32)
            left = self.tokens[positions]
            right = self.tokens[positions + self.sizes[left]]
            # The last token of a word has no right neighbor.
            inside = right != NONE
            keys = left[inside] * np.int64(n) + right[inside]
            for key, count, places in self._group(keys, positions[inside], min_count):
                yield TokenPair(*divmod(key, n), count, places)

    def still_there(self, pair: TokenPair) -> TokenPair:
        """The pair at the positions that later merges left it, with its present count.

        A position where a merge used one of its tokens never has the same pair again: it is part of
        a longer token now.
        """
        positions = pair.positions
        right = self.tokens[positions + self.sizes[pair.left]]
        positions = positions[(self.tokens[positions] == pair.left) & (right == pair.right)]
        count = int(self.counts[positions].sum(dtype=np.int64))
        return TokenPair(pair.left, pair.right, count, positions)

    def merge(self, pair: TokenPair, new: int, min_count: int) -> Iterator[TokenPair]:
        """Write the token `new` in place of `pair`;
        yield the new pairs that occur at least `min_count` times.

        Each of them has `new` on one side or on both.
        """
        tokens, left_size = self.tokens, self.sizes[pair.left]
        self.sizes[new] = left_size + self.sizes[pair.right]
        first = pair.positions
        if pair.left == pair.right:
            first = _without_overlaps(first, left_size)
        last = first + (self.sizes[new] - 1)
        # The right token does not start any more; the new one is written at its first and last
        # byte.
        tokens[first + left_size] = NONE
        self.starts[first + left_size] = False
        tokens[first] = tokens[last] = new
        # The new token makes a pair with each neighbor. `new new` is counted once, from its right
        # side.
        before, after = tokens[first - 1], tokens[last + 1]
        has_before = before != NONE
        has_after = (after != NONE) & (after != new)
        # One key per pair: the left neighbor, or n + the right neighbor.
        n = len(self.sizes)
        keys = np.concatenate([before[has_before], n + after[has_after]])
        before_positions = first[has_before] - self.sizes[before[has_before]]
        positions = np.concatenate([before_positions, first[has_after]])
        for key, count, places in self._group(keys, positions, min_count):
            left, right = (key, new) if key < n else (new, key - n)
            yield TokenPair(left, right, count, places)

    def _group(
        self, keys: np.ndarray, positions: np.ndarray, min_count: int
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """Each key whose positions count at least `min_count` together, that count,
        and its positions in order.
        """
        if not len(keys):
            return
        order = np.argsort(keys, kind="stable")
        keys, positions = keys[order], positions[order]
        changes = np.flatnonzero(keys[1:] != keys[:-1]) + 1
        borders = np.concatenate([[0], changes, [len(keys)]])
        counts = np.add.reduceat(self.counts[positions], borders[:-1], dtype=np.int64)
        for group in np.flatnonzero(counts >= min_count):
            start, stop = borders[group : group + 2]
            # A copy: a view would keep the positions of all groups in memory.
            yield int(keys[start]), int(counts[group]), positions[start:stop].copy()


def _without_overlaps(positions: np.ndarray, size: int) -> np.ndarray:
    """Where `x x` is replaced: in a run of x, from the left, the first and second,
    the third and fourth, ...
    """
    number = np.arange(len(positions))
    begins_run = np.concatenate([[True], np.diff(positions) != size])
    run_start = np.maximum.accumulate(np.where(begins_run, number, 0))
    return positions[(number - run_start) % 2 == 0]


def learn_merges(
    word_counts: Mapping[str, int], n_merges: int, *, on_progress: OnProgress | None = None
) -> list[tuple[bytes, bytes]]:
    """The first `n_merges` merges for words that occur this often;
    fewer if every word is one token before.

    >>> learn_merges({"low": 3, "lower": 1}, 3)
    [(b'o', b'w'), (b'l', b'ow'), (b'low', b'e')]
    """
    return merge_pairs(WordTable(word_counts, 256 + n_merges), n_merges, on_progress=on_progress)


def merge_pairs(
    table: WordTable, n_merges: int, *, on_progress: OnProgress | None = None
) -> list[tuple[bytes, bytes]]:
    """`learn_merges` for the words in a table, which is used up.

    All occurrences of a pair appear at once, with the younger of its tokens, and later merges can
    only remove some. So the count at that time is an upper bound from then on: the heap holds
    bounds, and only the pair at its top is counted again.

    Most pairs are too rare ever to be merged. The heap holds those that occur at least `min_count`
    times. When it is empty, `min_count` is lowered and the whole table is searched again, which
    happens a few times.
    """
    token_bytes = [bytes([byte]) for byte in range(256)]
    descending = [_descending(token) for token in token_bytes]
    merges: list[tuple[bytes, bytes]] = []
    heap: list[HeapEntry] = []
    min_count = max((pair.count for pair in table.pairs()), default=0) + 1
    while len(merges) < n_merges and (heap or min_count > 1):
        # No frequent pair is left: take in rarer ones.
        if not heap:
            min_count = max(min_count // RARER, 1)
            heap = [_heap_entry(pair, descending) for pair in table.pairs(min_count)]
            heapq.heapify(heap)
            continue
        # Count the pair with the highest bound again; if it is rarer now, it goes to its new place.
        bound, _, _, pair = heap[0]
        pair = table.still_there(pair)
        if pair.count < -bound:
            if pair.count >= min_count:
                heapq.heapreplace(heap, _heap_entry(pair, descending))
            else:
                heapq.heappop(heap)
            continue
        # No other pair is more frequent: merge it.
        heapq.heappop(heap)
        left, right = token_bytes[pair.left], token_bytes[pair.right]
        merges.append((left, right))
        token_bytes.append(left + right)
        descending.append(_descending(left + right))
        for new_pair in table.merge(pair, len(token_bytes) - 1, min_count):
            heapq.heappush(heap, _heap_entry(new_pair, descending))
        if on_progress is not None:
            on_progress("tokenizer: learning merges", len(merges), n_merges)
    return merges


HeapEntry = tuple[int, str, str, TokenPair]


def _heap_entry(pair: TokenPair, descending: Sequence[str]) -> HeapEntry:
    """An entry that is smallest, and so at the top, for the highest count,
    then for the greatest bytes.
    """
    return -pair.count, descending[pair.left], descending[pair.right], pair


FLIPPED = bytes(range(255, -1, -1))


def _descending(token: bytes) -> str:
    """A string that sorts in the opposite order of `token`.

    Every byte is flipped. The end of a token comes after every byte, so that `ab` sorts before `a`.
    """
    return token.translate(FLIPPED).decode("latin-1") + "\u0100"
