"""The rows of a run from several sources: which source each row comes from,
and which of its rows it is.

    place of the run ─▶ (source, number), by the weights      `Allocation`
                     ─▶ (source, row), by the order of each source      `mixture_row`
                     ─▶ the row      `MixtureRows`

Each source has rows of its own and is read pass after pass; the weights say how many of the run's
rows come from it, not how many tokens it has. One source is the mixture of one. Rows are windows of
a token file (run_files.py says of which), or examples of fine-tuning.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np

from tinylm.tokens.packing import MIXTURE, Collate, RankShare, RowDataset, RowOrder

# Rows that are allocated together: enough to mix a batch well.
BLOCK_ROWS = 1024


class Allocation:
    """The source of the row at each place, and its number among the rows of that source,
    from (seed, place) alone.

    Rows are allocated in blocks. Let V be the sum of the shares before a source and W = V + its
    share. Then it has floor(W n) - floor(V n) of the first n rows: at each end of a block the
    counts add up to n, and each differs from its share by less than one row. Within a block the
    sources are permuted by (seed, block); the rows of each source stay in order.

    >>> allocation = Allocation([3, 1], seed=1)
    >>> [allocation.counts(n) for n in (4, 6, 4096)]
    [[3, 1], [4, 2], [3072, 1024]]
    """

    def __init__(self, weights: Sequence[float], seed: int):
        shares = shares_of(weights)
        self.bounds, self.seed = list(accumulate(shares)), seed
        # At least one row of each source in a block: then no count can fall from one block
        # to the next.
        self.block_rows = max(BLOCK_ROWS, math.ceil(1 / min(shares)))
        self._block: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0), np.empty(0))

    def row(self, place: int) -> tuple[int, int]:
        """The source of the row at `place`, and its number among the rows that the run takes
        from this source.
        """
        block, offset = divmod(place, self.block_rows)
        if self._block[0] != block:
            self._block = (block, *self._deal(block))
        return int(self._block[1][offset]), int(self._block[2][offset])

    def counts(self, n: int) -> list[int]:
        """How many of the first `n` rows come from each source, if `n` ends a block."""
        ends = [math.floor(bound * n) for bound in self.bounds]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def counts_among(self, n: int) -> list[int]:
        """How many of the first `n` rows come from each source, for any `n`.

        >>> Allocation([3, 1], seed=1).counts_among(4)  # of 1024, not yet mixed well
        [3, 1]
        """
        block, offset = divmod(n, self.block_rows)
        sources, _ = self._deal(block)
        n_sources = len(self.bounds)
        in_block = np.bincount(sources[:offset], minlength=n_sources).tolist()
        before = self.counts(block * self.block_rows)
        return [a + b for a, b in zip(before, in_block, strict=True)]

    def _deal(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The sources of the rows of a block, and their numbers."""
        before = self.counts(block * self.block_rows)
        after = self.counts((block + 1) * self.block_rows)
        in_turn = np.repeat(np.arange(len(before)), np.subtract(after, before))
        sources = np.random.default_rng((self.seed, MIXTURE, block)).permutation(in_turn)
        numbers = np.empty(self.block_rows, dtype=np.int64)
        for source, (start, stop) in enumerate(zip(before, after, strict=True)):
            numbers[sources == source] = np.arange(start, stop)
        return sources, numbers


def mixture_row(allocation: Allocation, orders: Sequence[RowOrder], place: int) -> tuple[int, int]:
    """The source at a place of the run, and the row of that source:
    each source has an order of its own.
    """
    source, number = allocation.row(place)
    return source, orders[source](number)


@dataclass(frozen=True)
class MixtureRows:
    """The rows of several sources, by (source, row)."""

    sources: Sequence[Sequence[Any]]

    def __len__(self) -> int:
        """Of all sources together."""
        return sum(map(len, self.sources))

    def __getitem__(self, number: tuple[int, int]) -> Any:
        source, row = number
        return self.sources[source][row]


def mixture_dataset(
    sources: Sequence[Sequence[Any]],
    weights: Sequence[float],
    order: str,
    seed: int,
    collate: Collate,
    share: RankShare,
) -> RowDataset:
    """The training rows of a run from several sources.

    Args:
        sources: the rows of each source.
        weights: its weight.
        order: data.order, of the rows of each source.
        seed: the seed of the run; with it, a micro-batch is a function of its number alone.
        collate: makes a batch of rows.
        share: the rows of each micro-batch that this rank takes.
    """
    orders = [RowOrder(order, len(rows), seed, number) for number, rows in enumerate(sources)]
    row_at = partial(mixture_row, Allocation(weights, seed), orders)
    return RowDataset(MixtureRows(sources), row_at, collate, share)


def source_passes(
    weights: Sequence[float], seed: int, rows_per_pass: Sequence[float], n: int
) -> list[float]:
    """How often each source has been read after the first `n` rows of a run.

    >>> source_passes([3, 1], 1, [384, 512], 1024)
    [2.0, 0.5]
    """
    counts = Allocation(weights, seed).counts_among(n)
    return [count / n_rows for count, n_rows in zip(counts, rows_per_pass, strict=True)]


def mixture_fingerprint(weights: Sequence[float], fingerprints: Sequence[str]) -> str:
    """Identifies the training tokens of a mixture: those of the sources, and their shares.

    Shares, not weights: with 2 and 1 in place of 20 and 10 the rows of the run are the same.
    """
    parts = zip(shares_of(weights), fingerprints, strict=True)
    return " + ".join(f"{share} {fingerprint}" for share, fingerprint in parts)


def shares_of(weights: Sequence[float]) -> list[Fraction]:
    """The weights divided by their sum, exactly.

    >>> [str(share) for share in shares_of([0.3, 0.1])]
    ['3/4', '1/4']
    """
    # str: 0.1 is a tenth, not the binary number next to it
    exact = [Fraction(str(weight)) for weight in weights]
    return [weight / sum(exact) for weight in exact]
