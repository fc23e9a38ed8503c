"""Examples of fine-tuning to rows of one length, and to batches.

    B rows of a batch · T positions of a row

An example is tokens and a mark for each: trained or not. Its last token is only a label and its
first only an input, so n tokens take n - 1 positions. Example a is prompt p p with answer r r,
example b is q with answer s; T = 6:

    row  inputs        p  p  r | q   s | PAD  packing: packed; padded puts one example in a row
         labels        -  r  r | s EOS |  -   - is IGNORE_INDEX: prompts and padding are not trained
         document_ids  0  0  0 | 1   1 |  2   attention stops between examples

Knows nothing of text or templates (rows/).
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tinylm.tokens.packing import IGNORE_INDEX, Batch


@dataclass(frozen=True, eq=False)
class Example:
    """The tokens of one example, and which of them are trained."""

    ids: np.ndarray
    """(n,) int64"""
    trained: np.ndarray
    """(n,) bool: token i is a label"""
    location: str = ""
    """its file and line, for messages"""


def n_answers(example: Example) -> int:
    """The number of separate runs of labels, which is the number of answers.

    >>> n_answers(Example(np.zeros(5), np.array([False, True, True, False, True])))
    2
    """
    starts = np.diff(example.trained.astype(np.int8), prepend=0) > 0
    return int(np.count_nonzero(starts))


def pack_examples(lengths: Sequence[int], room: int) -> list[list[int]]:
    """The numbers of the examples in each row of `room` inputs; each example is in one row, whole.

    Best fit decreasing: it needs at most 11/9 of the fewest possible rows, if there are many
    examples (Johnson et al. 1974). The rows are a function of the lengths alone.

    >>> pack_examples([3, 5, 2, 4], room=7)
    [[1, 2], [3, 0]]
    """
    rows: list[list[int]] = []
    free_rows: list[tuple[int, int]] = []  # (free inputs, row), sorted
    # 1. the longest example first
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[number]
        if length > room:
            raise ValueError(f"example {number} has {length} inputs, and a row has {room}")
        # 2. into the row with the least room that is enough, or into a new one
        fit = bisect_left(free_rows, (length, 0))
        if fit == len(free_rows):
            rows.append([])
            free, row = room, len(rows) - 1
        else:
            free, row = free_rows.pop(fit)
        rows[row].append(number)
        # 3. the row has less room now
        insort(free_rows, (free - length, row))
    return rows


def fill_rows(examples: Sequence[Example], seq_len: int, packing: str) -> list[list[Example]]:
    """The examples of each row: several for `packed`, one for `padded`."""
    if packing == "padded":
        return [[example] for example in examples]
    lengths = [len(example.ids) - 1 for example in examples]
    return [[examples[number] for number in row] for row in pack_examples(lengths, seq_len)]


def row_of_examples(
    examples: Sequence[Example], seq_len: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, labels and document ids (T,) int64 of a row of examples, filled up with padding.

    >>> a, b = (Example(np.array(ids), np.array(ids) > 2) for ids in ([1, 2, 3], [1, 4, 5]))
    >>> [part.tolist() for part in row_of_examples([a, b], 5, pad_id=0)]
    [[1, 2, 1, 4, 0], [-100, 3, 4, 5, -100], [0, 0, 1, 1, 2]]
    """
    # padding, a document of its own
    inputs = np.full(seq_len, pad_id, dtype=np.int64)  # (T,)
    labels = np.full(seq_len, IGNORE_INDEX, dtype=np.int64)  # (T,)
    documents = np.full(seq_len, len(examples), dtype=np.int64)  # (T,)
    start = 0
    for number, example in enumerate(examples):
        # n tokens are n - 1 inputs, and the same tokens one place later are the labels
        stop = start + len(example.ids) - 1
        inputs[start:stop] = example.ids[:-1]
        labels[start:stop] = np.where(example.trained[1:], example.ids[1:], IGNORE_INDEX)
        documents[start:stop] = number
        start = stop
    return inputs, labels, documents


def collate_examples(
    rows: Sequence[Sequence[Example] | None],
    places: Sequence[int],
    *,
    seq_len: int,
    pad_id: int,
    packed: bool,
) -> Batch:
    """`input_ids` and `labels` (B, T) int64; if rows are packed also `document_ids` (B, T)."""
    filled = [row_of_examples(row or (), seq_len, pad_id) for row in rows]
    inputs, labels, documents = (
        torch.from_numpy(np.stack(part)) for part in zip(*filled, strict=True)
    )
    origin = [[example.location for example in row or ()] for row in rows]
    batch: Batch = {"input_ids": inputs, "labels": labels, "origin": origin}
    return batch | {"document_ids": documents} if packed else batch


def split_answer(inputs: Sequence[int], labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """The tokens before the last answer of a row, which an encoder reads, and that answer,
    which its decoder writes.

    >>> split_answer([1, 2, 3, 4, 0], [-100, -100, 4, 5, -100]), split_answer([0], [-100])
    (([1, 2, 3], [4, 5]), ([], []))
    """
    # from the end: skip what is not trained, then the answer
    end = len(labels)
    while end and labels[end - 1] == IGNORE_INDEX:
        end -= 1
    start = end
    while start and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    return (list(inputs[: start + 1]), list(labels[start:end])) if end else ([], [])
