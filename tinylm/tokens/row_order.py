"""Row order: which row of the data is at which place of a run, as pure functions of (seed, place).

All ranks share one sequence of places; micro-batch k of rank r takes `size` places of it. With size 2 and 2 ranks:

    place            0  1 | 2  3 | 4  5 | 6  7 | ...
    micro-batch        0      0      1      1               `Share.places`
    rank               0      1      0      1

    place ─▶ row number     pass after pass over the rows, in the order of data.order          `RowOrder`
                            each row once, then padding                                        `validation_order`

So a run that resumes at micro-batch k needs nothing but k, and R ranks read together what one device would read.
Knows nothing about the content of a row.
"""

from dataclasses import dataclass

import numpy as np

# The second element of the seed keeps the random numbers of different uses apart.
SHUFFLE, RANDOM, STREAM, MIXTURE = 1, 2, 3, 4


@dataclass(frozen=True)
class Share:
    """The places of each micro-batch that one rank takes."""

    size: int
    """rows of a micro-batch"""
    rank: int = 0
    world: int = 1

    def places(self, k: int) -> range:
        """The places of micro-batch `k` of this rank.

        >>> Share(2, rank=1, world=2).places(3)
        range(14, 16)
        """
        first = (k * self.world + self.rank) * self.size
        return range(first, first + self.size)


class RowOrder:
    """The row at each place of the training order; call it with a place.

    Args:
        kind: `sequential`; `shuffled`, another permutation in each pass; `random`, an independent draw for each place.
        n_rows: number of rows.
        seed: the seed of the run.
        source: number of the source in a mixture, so that its sources have different orders.

    >>> order = RowOrder("shuffled", 4, seed=1)
    >>> [order(place) for place in range(8)]
    [2, 0, 1, 3, 1, 3, 2, 0]
    """

    def __init__(self, kind: str, n_rows: int, seed: int, source: int = 0):
        self.kind = kind
        self.n_rows = n_rows
        self.seed = seed
        self.source = source
        self._pass = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def __call__(self, place: int) -> int:
        if self.kind == "random":
            rng = np.random.default_rng((self.seed, RANDOM, place, self.source))
            return int(rng.integers(self.n_rows))
        number, row = divmod(place, self.n_rows)
        if self.kind == "sequential":
            return row
        if number != self._pass:  # one permutation is kept: places mostly come in order
            rng = np.random.default_rng((self.seed, SHUFFLE, number, self.source))
            self._pass = number
            self._permutation = rng.permutation(self.n_rows)
        return int(self._permutation[row])


def validation_order(n_rows: int, place: int) -> int | None:
    """The row at a place of the validation order: each row once, then None, a row of padding.

    Padding gives every rank the same number of batches, so that none waits for another.
    """
    return place if place < n_rows else None


def count_batches(n_rows: int, share: Share, limit: int | None = None) -> int:
    """Validation batches of each rank, at most `limit`; the last ones may have padding.

    >>> count_batches(9, Share(2, rank=0, world=2)), count_batches(9, Share(2), limit=3)
    (3, 3)
    """
    n_batches = -(-n_rows // (share.size * share.world))
    return n_batches if limit is None else min(limit, n_batches)
