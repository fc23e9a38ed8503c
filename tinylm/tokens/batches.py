"""Rows to micro-batches of tensors, for training, validation and evaluation alike.

    rows, order, share ─▶ the rows of micro-batch k ─▶ collate ─▶ input_ids, labels (B, T)      `RowDataset`

The order is a pure function of (seed, place). All ranks share one sequence of places; micro-batch k of rank r takes
`size` places of it. With size 2 and 2 ranks:

    place            0  1 | 2  3 | 4  5 | 6  7 | ...
    micro-batch        0      0      1      1               `Share.places`
    rank               0      1      0      1

    place ─▶ row number     pass after pass over the rows, in the order of data.order          `RowOrder`
                            each row once, then padding                                        `validation_order`

So a run that resumes at micro-batch k needs nothing but k, and R ranks read together what one device would read.
Which rows there are is decided in packing.py and rows/. Knows torch, but not Lightning.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from tinylm.tokens.packing import IGNORE_INDEX, document_ids

Batch = dict[str, Any]
Collate = Callable[[Sequence[Any], Sequence[int]], Batch]
"""makes a batch of rows and their places; a row is None where there is only padding"""
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


class RowDataset(Dataset[Batch]):
    """Micro-batches by number: item k is a function of (seed, k), not of the items before it.

    Args:
        rows: the rows of the data, by the row numbers that `order` gives.
        order: place of the run to row number, or None for padding.
        collate: the rows of a micro-batch, and their places, to a batch.
        share: the places of each micro-batch that this rank takes.
        n_batches: number of micro-batches; None if there is no end, as in training.
    """

    def __init__(
        self,
        rows: Any,
        order: Callable[[int], Any],
        collate: Collate,
        share: Share,
        n_batches: int | None = None,
    ):
        self.rows = rows
        self.order = order
        self.collate = collate
        self.share = share
        self.n_batches = n_batches

    def __len__(self) -> int:
        if self.n_batches is None:
            raise TypeError("a training run has no length: its sampler says where it ends")
        return self.n_batches

    def __getitem__(self, k: int) -> Batch:
        if self.n_batches is not None and k >= self.n_batches:
            raise IndexError(k)  # ends a plain `for batch in dataset`
        places = self.share.places(k)
        numbers = [self.order(place) for place in places]
        rows = [None if number is None else self.rows[number] for number in numbers]
        return self.collate(rows, places)


def collate_rows(
    rows: Sequence[Any],
    places: Sequence[int],
    *,
    seq_len: int,
    pad_id: int,
    eos_id: int | None,
) -> Batch:
    """`input_ids` and `labels` (B, T) int64; with `eos_id` also `document_ids` (B, T) for the mask."""
    padding = (np.full(seq_len, pad_id), np.full(seq_len, IGNORE_INDEX), None)
    rows = [padding if row is None else row for row in rows]
    inputs = np.stack([row[0] for row in rows])  # (B, T)
    labels = np.stack([row[1] for row in rows])  # (B, T)
    batch: Batch = {
        "input_ids": torch.from_numpy(inputs),
        "labels": torch.from_numpy(labels),
        "origin": [row[2] for row in rows],
    }
    if eos_id is not None:
        batch["document_ids"] = torch.from_numpy(document_ids(inputs, eos_id))
    return batch
