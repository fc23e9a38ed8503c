"""Rows to micro-batches of tensors, for training, validation and evaluation alike.

    rows, order, share ─▶ the rows of micro-batch k ─▶ collate ─▶ input_ids, labels (B, T)

Which rows there are is decided in packing.py and rows/, their order in row_order.py. Knows torch,
but not Lightning.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from tinylm.tokens.packing import IGNORE_INDEX, document_ids
from tinylm.tokens.row_order import Share

Batch = dict[str, Any]
Collate = Callable[[Sequence[Any], Sequence[int]], Batch]
"""makes a batch of rows and their places; a row is None where there is only padding"""


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
