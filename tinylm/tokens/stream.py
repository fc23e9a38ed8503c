"""Micro-batches of documents that are read during training, with data.streaming:
no token file is made.

    documents from the cursor on ─▶ rows of T + 1 tokens      `pack_stream`
                                 ─▶ windows of rows, shuffled by (seed, window) ─▶ (B, T)  `StreamDataset`

The position in the stream is in each batch and in the checkpoint (`Cursor`),
so a resumed run continues exactly there.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from tinylm.config.schema import Config
from tinylm.text.data_source import train_documents
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.encode import encode_documents
from tinylm.tokens.packing import STREAM, Batch, RankShare, row_collate


class Position(NamedTuple):
    """A position in a stream that is read again and again: the pass, the document in it,
    the token in the document.
    """

    passes: int
    document: int
    token: int


def pack_stream(
    documents: Iterator[tuple[Position, np.ndarray]], seq_len: int
) -> Iterator[tuple[np.ndarray, Position]]:
    """Rows (T + 1,) of a stream in its order, each with the position at which the next row starts.

    Nothing is lost or repeated; a long document spans many rows.

    Args:
        documents: the tokens of each document, (n,), with the position of the first one.
        seq_len: T.
    """
    pieces: deque[tuple[Position, np.ndarray]] = deque()
    n_held = 0
    for piece in documents:
        # 1. collect documents until a row and its last label are there
        pieces.append(piece)
        n_held += len(piece[1])
        while n_held > seq_len:
            # 2. take T tokens; the next one is the last label, and the first input of the next row
            head = _take(pieces, seq_len)  # (T,)
            n_held -= seq_len
            position, rest = pieces[0]
            yield np.concatenate((head, rest[:1])), position  # (T + 1,)


def _take(pieces: deque[tuple[Position, np.ndarray]], n: int) -> np.ndarray:
    """Remove the first `n` tokens from `pieces` and return them, (n,);
    the rest begins with a token.
    """
    taken = []
    while n:
        position, ids = pieces.popleft()
        taken.append(ids[:n])
        if len(ids) > n:  # put back what is left of the document
            pieces.appendleft((position._replace(token=position.token + n), ids[n:]))
        n -= min(n, len(ids))
    while not len(pieces[0][1]):
        pieces.popleft()
    return np.concatenate(taken)


class Cursor(NamedTuple):
    """A position in a shuffled stream: the window of rows, how many of them are used,
    and where it starts.
    """

    window: int = 0
    used: int = 0
    passes: int = 0
    document: int = 0
    token: int = 0


class StreamDataset(IterableDataset[Batch]):
    """Micro-batches of documents that are read during training;
    each has the cursor of the row after it.

    One process reads the stream, whatever `num_workers`:
    a second one would only read the same documents again.
    """

    def __init__(
        self, config: Config, tokenizer: Tokenizer, share: RankShare, steps: range, cursor: Cursor
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.share = share
        self.steps = steps
        self.cursor = cursor

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        if worker is not None and worker.id > 0:
            return
        collate = row_collate(
            self.tokenizer,
            self.config.training.seq_len,
            document_mask=self.config.data.document_mask,
        )
        rows = self._shuffled_rows()
        n_rows = self.share.world * self.share.size
        for k in self.steps:
            places = self.share.places(k)
            mine = []
            for place in range(k * n_rows, (k + 1) * n_rows):  # every rank reads the rows of all
                row, cursor = next(rows)
                if place in places:
                    mine.append((row[:-1], row[1:], None))
            position = list(cursor)
            yield collate(mine, places) | {"cursor": position, "origin": position}

    def _shuffled_rows(self) -> Iterator[tuple[np.ndarray, Cursor]]:
        """Each row (T + 1,) with the cursor after it;
        windows are filled in order and shuffled by (seed, window).
        """
        size = self.config.data.shuffle_window
        window, used, *start = self.cursor
        rows = pack_stream(self._documents(Position(*start)), self.config.training.seq_len)
        while True:
            # 1. fill a window with the next rows of the stream
            filled = []
            for _ in range(size):
                row, end = next(rows)
                filled.append(row.astype(np.int64))
            # 2. shuffle it
            order: Sequence[int] = range(size)
            if self.config.data.order != "sequential":
                rng = np.random.default_rng((self.config.training.seed, STREAM, window))
                order = rng.permutation(size)
            # 3. hand out its rows, from the first unused one
            for i in range(used, size):
                yield filled[order[i]], Cursor(window, i + 1, *start)
            window, used, start = window + 1, 0, list(end)

    def _documents(self, start: Position) -> Iterator[tuple[Position, np.ndarray]]:
        """The documents from `start` on, pass after pass without end,
        each with the position of its first token.
        """
        data = self.config.data
        while True:
            documents = train_documents(data, self.config.training.seed, skip=start.document)
            encoded = encode_documents(
                documents,
                self.tokenizer,
                data.max_doc_len,
                name=f"{data.dataset}: training",
                first=start.document + 1,
            )
            for number, ids in enumerate(encoded, start.document):
                offset = start.token if number == start.document else 0
                if offset < len(ids):
                    yield Position(start.passes, number, offset), ids[offset:]
            start = Position(start.passes + 1, 0, 0)
