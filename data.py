"""What training eats: Lightning data modules that turn documents into micro-batches, in an order that is a function.

    token file ─▶ row numbers of micro-batch k, from (seed, k) alone ─▶ rows ─▶ batch        IndexedBatches
    stream     ─▶ rows in document order ─▶ windows of rows, shuffled by (seed, window) ─▶ batch     StreamBatches

The whole run is one sequence of micro-batches 0, 1, 2, ...; a pass over the data ends somewhere inside it. A resumed run
begins at micro-batch k and gets what an uninterrupted one would have got. For a token file k is all that takes; a
stream also needs the place in it, which travels with each batch (`cursor`) and is stored in the checkpoint. The result
does not depend on the number of worker processes. With R ranks, micro-batch k of rank r holds the rows that a single
device would see as micro-batch k·R + r: sharding happens here alone.
"""

import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from tinylm.config import Config
from tinylm.corpus import train_documents
from tinylm.encode import cached_token_file, encode_documents, source_fingerprint
from tinylm.errors import UserError, printable
from tinylm.packing import Position, count_rows, document_ids, pack_stream, row_at
from tinylm.processes import Progress
from tinylm.tokenfile import TokenFile
from tinylm.tokenizer import Tokenizer

Batch = dict[str, Any]

# Numbers that keep the random streams of different uses apart.
_SHUFFLE, _WINDOWS, _STREAM = 1, 2, 3


@dataclass(frozen=True)
class RowShape:
    """How rows are cut and marked."""

    seq_len: int
    stride: int
    pad_id: int
    eos_id: int
    document_mask: bool

    @classmethod
    def of(cls, config: Config, tokenizer: Tokenizer) -> "RowShape":
        """The rows that `config` asks for."""
        seq_len = config.training.seq_len
        return cls(seq_len, config.data.stride or seq_len, tokenizer.pad_id, tokenizer.eos_id, config.data.document_mask)


def make_batch(rows: list[tuple[np.ndarray, np.ndarray]], shape: RowShape) -> Batch:
    """`input_ids` and `labels` (B, T) int64; with a document mask also `document_ids` (B, T)."""
    inputs = np.stack([row[0] for row in rows])
    batch: Batch = {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(np.stack([row[1] for row in rows]))}
    if shape.document_mask:
        batch["document_ids"] = torch.from_numpy(document_ids(inputs, shape.eos_id))
    return batch


@dataclass(frozen=True)
class Share:
    """Which part of each global micro-batch this rank takes: `size` rows beginning at rank · size of world · size."""

    size: int
    rank: int = 0
    world: int = 1

    def places(self, k: int) -> range:
        """Numbers of this rank's rows of micro-batch `k` in the one sequence of rows that all ranks share.

        >>> Share(2, rank=1, world=2).places(3)
        range(14, 16)
        """
        first = (k * self.world + self.rank) * self.size
        return range(first, first + self.size)


class IndexedBatches(Dataset[Batch]):
    """Micro-batches of a token file; item k depends on (seed, k) and the file, and on nothing that happened before."""

    def __init__(self, file: TokenFile, shape: RowShape, order: str, seed: int, share: Share):
        self.file, self.shape, self.order, self.seed, self.share = file, shape, order, seed, share
        self.n_rows = count_rows(len(file), shape.seq_len, shape.stride)
        self._permutation: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __getitem__(self, k: int) -> Batch:
        starts = [self._start(place) for place in self.share.places(k)]
        batch = make_batch([row_at(self.file.tokens, start, self.shape.seq_len, self.shape.pad_id) for start in starts], self.shape)
        return batch | {"origin": starts}

    def _start(self, place: int) -> int:
        """The first token of the row that stands at `place` in the sequence of all rows of the run."""
        if self.order == "random":
            return int(np.random.default_rng((self.seed, _WINDOWS, place)).integers(len(self.file) - self.shape.seq_len))
        passes, row = divmod(place, self.n_rows)
        return self.shape.stride * int(self._row_order(passes)[row] if self.order == "shuffled" else row)

    def _row_order(self, passes: int) -> np.ndarray:
        """The permutation of the rows in this pass, kept until the next pass."""
        if self._permutation[0] != passes:
            self._permutation = (passes, np.random.default_rng((self.seed, _SHUFFLE, passes)).permutation(self.n_rows))
        return self._permutation[1]


class ValidationBatches(Dataset[Batch]):
    """The validation rows in their order, this rank's share of them; the last batch may be short."""

    def __init__(self, file: TokenFile, shape: RowShape, share: Share, limit: int | None):
        # Validation asks for every token once, whatever the stride of training.
        self.file, self.shape, self.share = file, replace(shape, stride=shape.seq_len), share
        self.n_rows = count_rows(len(file), shape.seq_len, shape.seq_len)
        batches = -(-self.n_rows // (share.size * share.world))
        self.n_batches = batches if limit is None else min(limit, batches)

    def __len__(self) -> int:
        return self.n_batches

    def __getitem__(self, k: int) -> Batch:
        if k >= self.n_batches:
            raise IndexError(k)  # ends a plain `for batch in batches`
        # A place beyond the last row gives a row of padding, so that all ranks do the same number of batches.
        starts = [place * self.shape.seq_len for place in self.share.places(k)]
        return make_batch([row_at(self.file.tokens, start, self.shape.seq_len, self.shape.pad_id) for start in starts], self.shape)


@dataclass(frozen=True)
class Cursor:
    """A place in a shuffled stream: where its current window of rows began, and how many of them are used."""

    window: int = 0
    used: int = 0
    start: Position = Position(0, 0, 0)

    def to_plain(self) -> list[int]:
        """Plain numbers for a checkpoint."""
        return [self.window, self.used, *self.start]

    @classmethod
    def from_plain(cls, plain: list[int]) -> "Cursor":
        """The inverse of `to_plain`."""
        return cls(plain[0], plain[1], Position(*plain[2:]))


class StreamBatches(IterableDataset[Batch]):
    """Micro-batches of documents that are read as training goes; each carries the cursor that follows it.

    One process reads the stream, whatever `num_workers`: a second one would only read the same documents again.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, share: Share, steps: range, cursor: Cursor):
        self.config, self.tokenizer, self.share, self.steps, self.cursor = config, tokenizer, share, steps, cursor

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        if worker is not None and worker.id > 0:
            return
        shape, rows = RowShape.of(self.config, self.tokenizer), self._shuffled_rows()
        for k in self.steps:
            mine, cursor = [], self.cursor
            for place in range(k * self.share.world * self.share.size, (k + 1) * self.share.world * self.share.size):
                row, cursor = next(rows)
                if place in self.share.places(k):
                    mine.append((row[:-1], row[1:]))
            yield make_batch(mine, shape) | {"cursor": cursor.to_plain(), "origin": cursor.to_plain()}

    def _shuffled_rows(self) -> Iterator[tuple[np.ndarray, Cursor]]:
        """Each row with the cursor after it; windows of rows are filled in order and shuffled by (seed, window)."""
        size, seed = self.config.data.shuffle_window, self.config.training.seed
        number, used, start = self.cursor.window, self.cursor.used, self.cursor.start
        rows = pack_stream(self._documents(start), self.config.training.seq_len)
        while True:
            window = []
            for _ in range(size):
                row, end = next(rows)
                window.append(row.astype(np.int64))
            order = range(size) if self.config.data.order == "sequential" else np.random.default_rng((seed, _STREAM, number)).permutation(size)
            for i in range(used, size):
                yield window[order[i]], Cursor(number, i + 1, start)
            number, used, start = number + 1, 0, end

    def _documents(self, start: Position) -> Iterator[tuple[Position, np.ndarray]]:
        """Every document from `start` on, pass after pass without end, each with the place of its first token."""
        while True:
            documents = train_documents(self.config.data, self.config.training.seed, skip=start.document)
            label = f"{printable(self.config.data.dataset)}: training"
            encoded = encode_documents(documents, self.tokenizer, self.config.data.max_doc_len, source=label, first=start.document + 1)
            for number, ids in enumerate(encoded, start.document):
                offset = start.token if number == start.document else 0
                if offset < len(ids):
                    yield Position(start.passes, number, offset), ids[offset:]
            start = Position(start.passes + 1, 0, 0)


def leave_signals_alone(worker: int) -> None:
    """Let a worker process live on after Ctrl-C, which a terminal sends to the whole group: the run still needs it to finish the step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class LitData(L.LightningDataModule):
    """The batches of one pretraining run.

    `prepare` makes the token files, and must be called before the loaders are; `start_at` says where a resumed run goes on.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.first_batch, self.cursor = 0, Cursor()
        self.train_file: TokenFile | None = None
        self.val_file: TokenFile | None = None

    def prepare(self, progress: Progress | None = None) -> None:
        """Encode what is not encoded yet.

        Raises:
            UserError: the training data are shorter than one row.
        """
        config = self.config
        self.val_file = cached_token_file(config.data, "val", self.tokenizer, config.training.seed, progress=progress)
        if config.data.streaming:
            return
        self.train_file = cached_token_file(config.data, "train", self.tokenizer, config.training.seed, progress=progress)
        needed = config.training.seq_len + 1
        if len(self.train_file) < needed:
            found = f"{printable(config.data.dataset)} gives {len(self.train_file)} training tokens"
            raise UserError(f"data.dataset: {found}, and one row of training.seq_len needs {needed}. Give more text or lower training.seq_len.")

    def start_at(self, batch: int, cursor: list[int] | None) -> None:
        """Go on at micro-batch `batch`; a stream from the place that its checkpoint stored."""
        self.first_batch = batch
        if cursor is not None:
            self.cursor = Cursor.from_plain(cursor)

    def fingerprints(self) -> dict[str, str]:
        """What identifies the data: two runs with equal ones see the same tokens. A hub dataset is known by its name alone."""
        assert self.val_file is not None, "prepare() makes the validation file"
        train = source_fingerprint(self.config.data, "train")[:12] if self.train_file is None else self.train_file.fingerprint
        return {"train": train, "val": self.val_file.fingerprint}

    def train_dataloader(self) -> DataLoader[Batch]:
        """The micro-batches from `first_batch` to the end of the run."""
        training = self.config.training
        steps = range(self.first_batch, training.max_steps * training.grad_accum_steps)
        if self.train_file is None:
            return self._loader(StreamBatches(self.config, self.tokenizer, self._share(), steps, self.cursor))
        shape = RowShape.of(self.config, self.tokenizer)
        return self._loader(IndexedBatches(self.train_file, shape, self.config.data.order, training.seed, self._share()), steps)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation rows, at most training.val_batches batches of them."""
        assert self.val_file is not None, "prepare() makes the validation file"
        shape = RowShape.of(self.config, self.tokenizer)
        batches = ValidationBatches(self.val_file, shape, self._share(), self.config.training.val_batches)
        return DataLoader(batches, batch_size=None)

    def _share(self) -> Share:
        size = self.config.training.micro_batch_size
        return Share(size) if self.trainer is None else Share(size, self.trainer.global_rank, self.trainer.world_size)

    def _loader(self, batches: Any, steps: range | None = None) -> DataLoader[Batch]:
        workers = self.config.data.num_workers
        return DataLoader(
            batches,
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=leave_signals_alone,
        )
