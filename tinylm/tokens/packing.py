"""Documents to rows of one length: what the model sees and what it should answer.

Tokens of all documents stand one after another, each document closed by EOS. A row of T tokens starts somewhere in
that sequence; its labels are the same tokens one place further on, so that position t is asked for token t+1:

    tokens   d0 d0 d0 EOS d1 d1 ...          row 0 starts at 0, row 1 at T (or at the stride)
    inputs   d0 d0 d0 EOS                    labels   d0 d0 EOS d1

EOS closes a document and opens the next: for document masks it counts as the first input of the document after it, so
that a document's first token is asked for given EOS alone, which is also how sampling from an empty prompt begins.
Every token but the very first is a target exactly once (with the default stride); this file knows nothing of text.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# Labels with this value are not trained: torch's cross entropy takes it as its default too.
IGNORE_INDEX = -100


def count_rows(n_tokens: int, seq_len: int, stride: int) -> int:
    """Rows that start every `stride` tokens and together ask for every token but the first.

    >>> count_rows(9, 4, 4), count_rows(10, 4, 4), count_rows(9, 4, 1)
    (2, 3, 5)
    """
    targets = n_tokens - 1
    return 1 + max(0, -(-(targets - seq_len) // stride))


def row_at(
    tokens: np.ndarray, start: int, seq_len: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels (T,) int64 of the row at `start`; what lies beyond the last token is padding, never a target.

    >>> [part.tolist() for part in row_at(np.array([5, 6, 7, 8]), 2, 3, pad_id=0)]
    [[7, 8, 0], [8, -100, -100]]
    """
    window = np.asarray(tokens[start : start + seq_len + 1], dtype=np.int64)
    missing = seq_len + 1 - len(window)
    inputs = np.pad(window, (0, missing), constant_values=pad_id)[:-1]
    labels = np.pad(window, (0, missing), constant_values=IGNORE_INDEX)[1:]
    return inputs, labels


def document_ids(input_ids: np.ndarray, eos_id: int) -> np.ndarray:
    """A number a document for inputs (..., T): it grows by one at each EOS, which opens the next document.

    >>> document_ids(np.array([7, 7, 2, 8, 8]), eos_id=2).tolist()
    [0, 0, 1, 1, 1]
    """
    return np.cumsum(input_ids == eos_id, axis=-1)


class Position(NamedTuple):
    """A place in a stream that is read again and again: the pass, the document in it, the token in the document."""

    passes: int
    document: int
    token: int


def pack_stream(
    documents: Iterator[tuple[Position, np.ndarray]], seq_len: int
) -> Iterator[tuple[np.ndarray, Position]]:
    """Rows (T+1,) of a stream in its order, each with the place where the next row starts.

    `documents` gives the place of each document's first token and the tokens from there. A row has T inputs; its last
    token is only a target and opens the next row. Nothing is lost or repeated; a long document spans many rows.
    """
    pieces: deque[tuple[Position, np.ndarray]] = deque()
    held = 0
    for piece in documents:
        pieces.append(piece)
        held += len(piece[1])
        while held > seq_len:
            head = _take(pieces, seq_len)
            held -= seq_len
            place, rest = pieces[0]
            yield np.concatenate((head, rest[:1])), place


def _take(pieces: deque[tuple[Position, np.ndarray]], n: int) -> np.ndarray:
    """The first `n` tokens, taken out of `pieces`; what is left begins with a token."""
    taken = []
    while n:
        place, ids = pieces.popleft()
        taken.append(ids[:n])
        if len(ids) > n:
            pieces.appendleft((place._replace(token=place.token + n), ids[n:]))
        n -= min(n, len(ids))
    while not len(pieces[0][1]):
        pieces.popleft()
    return np.concatenate(taken)


# --- examples of fine-tuning ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Example:
    """The tokens of one example, and which of them it asks for."""

    ids: np.ndarray
    """(n,) int64"""
    trained: np.ndarray
    """(n,) bool: token i is a target"""
    place: str = ""
    """where its row stands in the data, for messages"""


def n_answers(example: Example) -> int:
    """How many runs of targets an example has.

    >>> n_answers(Example(np.zeros(5), np.array([False, True, True, False, True])))
    2
    """
    return int(np.count_nonzero(np.diff(example.trained.astype(np.int8), prepend=0) > 0))


def pack_examples(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which examples share a row of `room` inputs: best fit, the longest first; each is in one row, whole.

    The rows are a function of the lengths alone; for many examples there are at most 11/9 of the fewest possible (Johnson et al. 1974).

    >>> pack_examples([3, 5, 2, 4], room=7)
    [[1, 2], [3, 0]]
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (inputs that are free, row), sorted
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[number] > room:
            raise ValueError(f"example {number} has {lengths[number]} inputs, and a row has {room}")
        fit = bisect_left(spaces, (lengths[number], 0))
        if fit == len(spaces):
            rows.append([])
            free, row = room, len(rows) - 1
        else:
            free, row = spaces.pop(fit)
        rows[row].append(number)
        insort(spaces, (free - lengths[number], row))
    return rows


def fill_rows(examples: Sequence[Example], seq_len: int, packing: str) -> list[list[Example]]:
    """The examples of each row: several for `packed`, one for `padded`."""
    if packing == "padded":
        return [[example] for example in examples]
    lengths = [len(example.ids) - 1 for example in examples]
    return [[examples[number] for number in row] for row in pack_examples(lengths, seq_len)]


def split_answer(inputs: Sequence[int], labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """What stands before the last answer of a row, and that answer: what an encoder reads, and what its decoder writes.

    >>> split_answer([1, 2, 3, 4, 0], [-100, -100, 4, 5, -100]), split_answer([0], [-100])
    (([1, 2, 3], [4, 5]), ([], []))
    """
    end = len(labels)
    while end and labels[end - 1] == IGNORE_INDEX:
        end -= 1
    start = end
    while start and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    return (list(inputs[: start + 1]), list(labels[start:end])) if end else ([], [])


def row_of_examples(
    examples: Sequence[Example], seq_len: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, labels and document ids (T,) int64 of examples in one row, which is filled up with padding.

    An example's last token is only a target, so n tokens take n - 1 places; its first is only an input.

    >>> a, b = (Example(np.array(ids), np.array(ids) > 2) for ids in ([1, 2, 3], [1, 4, 5]))
    >>> [part.tolist() for part in row_of_examples([a, b], 5, pad_id=0)]
    [[1, 2, 1, 4, 0], [-100, 3, 4, 5, -100], [0, 0, 1, 1, 2]]
    """
    inputs = np.full(seq_len, pad_id, dtype=np.int64)
    labels = np.full(seq_len, IGNORE_INDEX, dtype=np.int64)
    documents = np.full(seq_len, len(examples), dtype=np.int64)
    start = 0
    for number, example in enumerate(examples):
        stop = start + len(example.ids) - 1
        inputs[start:stop] = example.ids[:-1]
        labels[start:stop] = np.where(example.trained[1:], example.ids[1:], IGNORE_INDEX)
        documents[start:stop] = number
        start = stop
    return inputs, labels, documents
