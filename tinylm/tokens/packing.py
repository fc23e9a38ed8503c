"""Tokens to rows of one length, and rows to micro-batches: what the model sees,
and what it must predict.

    N number of tokens · T positions of a row · B rows of a micro-batch

The tokens of all documents follow each other, each document closed by EOS. A row is T + 1 of them:
the first T are inputs, the last T labels, so position t must predict token t + 1. With T = 4,
documents a (3 tokens) and b (4 tokens):

    tokens          a0  a1  a2 EOS  b0  b1  b2  b3 EOS   (N,)
    row 0  inputs   a0  a1  a2 EOS                       (T,)
           labels   a1  a2 EOS  b0                       (T,)
    row 1  inputs                   b0  b1  b2  b3       starts at the last label of row 0
           labels                   b1  b2  b3 EOS
    document_ids     0   0   0   1 | 0   0   0   0       from 0 in each row; with data.document_mask

So every token but the very first is a label exactly once (with the default stride T). EOS closes a
document and, as an input, opens the next one: the first token of a document is predicted from EOS
alone, which is also how sampling from an empty prompt begins. After the last token a row is filled
with padding, whose labels are IGNORE_INDEX.

A micro-batch is the rows at some places of the run, (B, T). The order is a pure function of (seed,
place). All ranks share one sequence of places; micro-batch k of rank r takes `size` places of it.
With size 2 and 2 ranks:

    place            0  1 | 2  3 | 4  5 | 6  7 | ...
    micro-batch        0      0      1      1               `RankShare.places`
    rank               0      1      0      1

    place ─▶ row number  pass after pass over the rows, in the order of data.order  `RowOrder`
                         each row once, then padding                                `validation_order`

So a run that resumes at micro-batch k needs nothing but k,
and R ranks read together what one device would read.

Examples of fine-tuning are put into rows in example_rows.py, documents that are streamed in
stream.py, and the rows of several sources are mixed in mixture.py. Knows torch, but not Lightning;
knows nothing of text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.token_file import JoinedFiles, TokenFile

# Labels with this value are not trained; it is also the default of torch's cross entropy.
IGNORE_INDEX = -100


def count_rows(n_tokens: int, seq_len: int, stride: int) -> int:
    """The number of rows that start every `stride` tokens
    and together have every token but the first as a label.

    >>> count_rows(9, 4, 4), count_rows(10, 4, 4), count_rows(9, 4, 1)
    (2, 3, 5)
    """
    n_labels = n_tokens - 1
    # Row 0 has the first T labels; every other row adds `stride` of them
    # (rounded up: the last row may be short).
    n_more = -(-(n_labels - seq_len) // stride)
    return 1 + max(0, n_more)


def row_at(
    tokens: np.ndarray, start: int, seq_len: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels (T,) int64 of the row that starts at `start`, padded after the last token.

    >>> [part.tolist() for part in row_at(np.array([5, 6, 7, 8]), 2, 3, pad_id=0)]
    [[7, 8, 0], [8, -100, -100]]
    """
    # one token more than inputs: the last label
    window = np.asarray(tokens[start : start + seq_len + 1], dtype=np.int64)  # (at most T + 1,)
    missing = seq_len + 1 - len(window)
    # the same tokens, padded, then shifted by one
    inputs = np.pad(window, (0, missing), constant_values=pad_id)[:-1]  # (T,)
    labels = np.pad(window, (0, missing), constant_values=IGNORE_INDEX)[1:]  # (T,)
    return inputs, labels


def document_ids(input_ids: np.ndarray, eos_id: int) -> np.ndarray:
    """The number of the document of each input (..., T): it grows by one at each EOS,
    which opens the next document.

    >>> document_ids(np.array([7, 7, 2, 8, 8]), eos_id=2).tolist()
    [0, 0, 1, 1, 1]
    """
    return np.cumsum(input_ids == eos_id, axis=-1)


@dataclass(frozen=True)
class TokenRows:
    """The rows of a token file: row i starts at token i * stride.

    A worker process reopens the file, so its tokens are never copied.
    """

    file: TokenFile | JoinedFiles
    seq_len: int
    stride: int
    pad_id: int
    source: int | None = None
    """its number in a mixture of several"""

    def __len__(self) -> int:
        return count_rows(len(self.file), self.seq_len, self.stride)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray, Any]:
        """Inputs and labels (T,) int64, and the first token; in a mixture, (source, first token)."""
        self.file.require_whole()
        start = number * self.stride
        origin = start if self.source is None else (self.source, start)
        return *row_at(self.file.tokens, start, self.seq_len, self.pad_id), origin


# --- rows to micro-batches, for training, validation and evaluation alike ---

Batch = dict[str, Any]
Collate = Callable[[Sequence[Any], Sequence[int]], Batch]
"""makes a batch of rows and their places; a row is None where there is only padding"""
# The second element of the seed keeps the random numbers of different uses apart.
SHUFFLE, RANDOM, STREAM, MIXTURE = 1, 2, 3, 4


@dataclass(frozen=True)
class RankShare:
    """The places of each micro-batch that one rank takes."""

    size: int
    """rows of a micro-batch"""
    rank: int = 0
    world: int = 1

    def places(self, k: int) -> range:
        """The places of micro-batch `k` of this rank.

        >>> RankShare(2, rank=1, world=2).places(3)
        range(14, 16)
        """
        first = (k * self.world + self.rank) * self.size
        return range(first, first + self.size)


@dataclass(eq=False)
class RowOrder:
    """The row at each place of the training order; call it with a place.

    Args:
        kind: `sequential`; `shuffled`, another permutation in each pass; `random`,
            an independent draw for each place.
        n_rows: number of rows.
        seed: the seed of the run.
        source_number: number of the source in a mixture, so that its sources have different orders.

    >>> order = RowOrder("shuffled", 4, seed=1)
    >>> [order(place) for place in range(8)]
    [2, 0, 1, 3, 1, 3, 2, 0]
    """

    kind: str
    n_rows: int
    seed: int
    source_number: int = 0
    _pass: int = field(default=-1, init=False)
    _permutation: np.ndarray = field(default_factory=partial(np.empty, 0), init=False)

    def __call__(self, place: int) -> int:
        if self.kind == "random":
            rng = np.random.default_rng((self.seed, RANDOM, place, self.source_number))
            return int(rng.integers(self.n_rows))
        number, row = divmod(place, self.n_rows)
        if self.kind == "sequential":
            return row
        if number != self._pass:  # one permutation is kept: places mostly come in order
            rng = np.random.default_rng((self.seed, SHUFFLE, number, self.source_number))
            self._pass = number
            self._permutation = rng.permutation(self.n_rows)
        return int(self._permutation[row])


def validation_order(n_rows: int, place: int) -> int | None:
    """The row at a place of the validation order: each row once, then None, a row of padding.

    Padding gives every rank the same number of batches, so that none waits for another.
    """
    return place if place < n_rows else None


def count_batches(n_rows: int, share: RankShare, limit: int | None = None) -> int:
    """Validation batches of each rank, at most `limit`; the last ones may have padding.

    >>> count_batches(9, RankShare(2, rank=0, world=2)), count_batches(9, RankShare(2), limit=3)
    (3, 3)
    """
    n_batches = -(-n_rows // (share.size * share.world))
    return n_batches if limit is None else min(limit, n_batches)


@dataclass(frozen=True, eq=False)
class RowDataset(Dataset[Batch]):
    """Micro-batches by number: item k is a function of (seed, k), not of the items before it.

    Args:
        rows: the rows of the data, by the row numbers that `order` gives.
        order: place of the run to row number, or None for padding.
        collate: the rows of a micro-batch, and their places, to a batch.
        share: the places of each micro-batch that this rank takes.
        n_batches: number of micro-batches; None if there is no end, as in training.
    """

    rows: Any
    order: Callable[[int], Any]
    collate: Collate
    share: RankShare
    n_batches: int | None = None

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


def row_collate(tokenizer: Tokenizer, seq_len: int, *, document_mask: bool) -> Collate:
    """`collate_rows` for rows of this length; `document_mask` is data.document_mask."""
    eos_id = tokenizer.eos_id if document_mask else None
    return partial(collate_rows, seq_len=seq_len, pad_id=tokenizer.pad_id, eos_id=eos_id)


def collate_rows(
    rows: Sequence[Any],
    places: Sequence[int],
    *,
    seq_len: int,
    pad_id: int,
    eos_id: int | None,
) -> Batch:
    """`input_ids` and `labels` (B, T) int64; with `eos_id` also `document_ids`
    (B, T) for the mask.
    """
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
