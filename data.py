"""What training eats: Lightning data modules that turn documents into micro-batches, in an order that is a function.

    token files ─▶ row numbers of micro-batch k, from (seed, k) alone ─▶ rows ─▶ batch       IndexedBatches
    stream     ─▶ rows in document order ─▶ windows of rows, shuffled by (seed, window) ─▶ batch     StreamBatches
    examples   ─▶ packed rows, or one example a row ─▶ row numbers as for a token file ─▶ batch      ExampleBatches

The whole run is one sequence of micro-batches 0, 1, 2, ...; a pass over the data ends somewhere inside it. A resumed run
begins at micro-batch k and gets what an uninterrupted one would have got. For token files k is all that takes; a
stream also needs the place in it, which travels with each batch (`cursor`) and is stored in the checkpoint. The result
does not depend on the number of worker processes. With R ranks, micro-batch k of rank r holds the rows that a single
device would see as micro-batch k·R + r: sharding happens here alone.
"""

import hashlib
import signal
import sys
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from tinylm.common.errors import UserError, printable
from tinylm.common.processes import Progress
from tinylm.config.schema import Config
from tinylm.eval.tasks.data import conversation_parser, requested_built_in_rows
from tinylm.rows.inspect import InspectedRow
from tinylm.rows.row_files import NAMED_PLACES, resolve_dataset
from tinylm.rows.sft import Report, build_examples, shared_examples, shared_questions
from tinylm.rows.template_factory import make_template
from tinylm.rows.templates import Template
from tinylm.text.splits import Which, train_documents
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.encode import encode_documents, source_fingerprint
from tinylm.tokens.mixture import (
    Allocation,
    Joined,
    training_files,
    training_fingerprint,
    validation_file,
    weights_of,
)
from tinylm.tokens.packing import (
    Example,
    Position,
    count_rows,
    document_ids,
    pack_examples,
    pack_stream,
    row_at,
    row_of_examples,
)
from tinylm.tokens.token_file import TokenFile

Batch = dict[str, Any]

MOVED = "data.py only holds the data modules: use `python train.py --config ... --show-rows N` or `python finetune.py --config ... --show-rows N`"

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
        return cls(
            seq_len,
            config.data.stride or seq_len,
            tokenizer.pad_id,
            tokenizer.eos_id,
            config.data.document_mask,
        )


def make_batch(rows: list[tuple[np.ndarray, np.ndarray]], shape: RowShape) -> Batch:
    """`input_ids` and `labels` (B, T) int64; with a document mask also `document_ids` (B, T)."""
    inputs = np.stack([row[0] for row in rows])
    batch: Batch = {
        "input_ids": torch.from_numpy(inputs),
        "labels": torch.from_numpy(np.stack([row[1] for row in rows])),
    }
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


class FileRows:
    """The rows of a token file in the order in which training takes them, pass after pass: row n depends on (seed, n) alone.

    `source` keeps the order apart from that of the other sources of a mixture.
    """

    def __init__(self, file: TokenFile, shape: RowShape, order: str, seed: int, source: int = 0):
        self.file, self.shape, self.order, self.seed, self.source = file, shape, order, seed, source
        self.n_rows = count_rows(len(file), shape.seq_len, shape.stride)
        self._permutation: tuple[int, np.ndarray] = (-1, np.empty(0))

    def start(self, n: int) -> int:
        """The first token of row `n`."""
        if self.order == "random":
            return int(
                np.random.default_rng((self.seed, _WINDOWS, n, self.source)).integers(
                    len(self.file) - self.shape.seq_len
                )
            )
        passes, row = divmod(n, self.n_rows)
        return self.shape.stride * int(
            self._row_order(passes)[row] if self.order == "shuffled" else row
        )

    def at(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels (T,) of the row that begins with token `start`."""
        return row_at(self.file.tokens, start, self.shape.seq_len, self.shape.pad_id)

    def _row_order(self, passes: int) -> np.ndarray:
        """The permutation of the rows in this pass, kept until the next pass."""
        if self._permutation[0] != passes:
            self._permutation = (
                passes,
                np.random.default_rng((self.seed, _SHUFFLE, passes, self.source)).permutation(
                    self.n_rows
                ),
            )
        return self._permutation[1]


class IndexedBatches(Dataset[Batch]):
    """Micro-batches of token files; item k depends on (seed, k), the files and their weights, and on nothing that happened before."""

    def __init__(
        self,
        files: Sequence[TokenFile],
        shape: RowShape,
        order: str,
        seed: int,
        share: Share,
        weights: Sequence[float] = (1.0,),
    ):
        self.sources = [
            FileRows(file, shape, order, seed, source) for source, file in enumerate(files)
        ]
        self.shape, self.share, self.allocation = shape, share, Allocation(weights, seed)

    def __getitem__(self, k: int) -> Batch:
        picks = [self.pick(place) for place in self.share.places(k)]
        batch = make_batch([self.sources[source].at(start) for source, start in picks], self.shape)
        return batch | {"origin": picks if len(self.sources) > 1 else [start for _, start in picks]}

    def pick(self, place: int) -> tuple[int, int]:
        """The source and the first token of the row that stands at `place` in the sequence of all rows of the run."""
        source, n = self.allocation.row(place)
        return source, self.sources[source].start(n)


class ValidationBatches(Dataset[Batch]):
    """The validation rows in their order, this rank's share of them; the last batch may be short."""

    def __init__(self, file: TokenFile | Joined, shape: RowShape, share: Share, limit: int | None):
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
        return make_batch(
            [
                row_at(self.file.tokens, start, self.shape.seq_len, self.shape.pad_id)
                for start in starts
            ],
            self.shape,
        )


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

    def __init__(
        self, config: Config, tokenizer: Tokenizer, share: Share, steps: range, cursor: Cursor
    ):
        self.config, self.tokenizer, self.share, self.steps, self.cursor = (
            config,
            tokenizer,
            share,
            steps,
            cursor,
        )

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        if worker is not None and worker.id > 0:
            return
        shape, rows = RowShape.of(self.config, self.tokenizer), self._shuffled_rows()
        for k in self.steps:
            mine, cursor = [], self.cursor
            for place in range(
                k * self.share.world * self.share.size, (k + 1) * self.share.world * self.share.size
            ):
                row, cursor = next(rows)
                if place in self.share.places(k):
                    mine.append((row[:-1], row[1:]))
            yield make_batch(mine, shape) | {
                "cursor": cursor.to_plain(),
                "origin": cursor.to_plain(),
            }

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
            order = (
                range(size)
                if self.config.data.order == "sequential"
                else np.random.default_rng((seed, _STREAM, number)).permutation(size)
            )
            for i in range(used, size):
                yield window[order[i]], Cursor(number, i + 1, start)
            number, used, start = number + 1, 0, end

    def _documents(self, start: Position) -> Iterator[tuple[Position, np.ndarray]]:
        """Every document from `start` on, pass after pass without end, each with the place of its first token."""
        while True:
            documents = train_documents(
                self.config.data, self.config.training.seed, skip=start.document
            )
            label = f"{printable(self.config.data.dataset)}: training"
            encoded = encode_documents(
                documents,
                self.tokenizer,
                self.config.data.max_doc_len,
                source=label,
                first=start.document + 1,
            )
            for number, ids in enumerate(encoded, start.document):
                offset = start.token if number == start.document else 0
                if offset < len(ids):
                    yield Position(start.passes, number, offset), ids[offset:]
            start = Position(start.passes + 1, 0, 0)


def leave_signals_alone(worker: int) -> None:
    """Let a worker process live on after Ctrl-C, which a terminal sends to the whole group: the run still needs it to finish the step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class RunData(L.LightningDataModule):
    """What the data of every run have: a share of each micro-batch for this rank, and a loader that prepares batches."""

    config: Config
    tokenizer: Tokenizer

    @abstractmethod
    def inspect_rows(self) -> Iterator[list[InspectedRow]]:
        """The rows of the run in order, each as one row to print or several (`training/show_rows.py`)."""

    def _share(self) -> Share:
        size = self.config.training.micro_batch_size
        return (
            Share(size)
            if self.trainer is None
            else Share(size, self.trainer.global_rank, self.trainer.world_size)
        )

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


class PretrainData(RunData):
    """The batches of one pretraining run.

    `prepare` makes the token files, and must be called before the loaders are; `start_at` says where a resumed run goes on.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.first_batch, self.cursor = 0, Cursor()
        self.train_files: tuple[TokenFile, ...] = ()
        """one a source; none for a stream"""
        self.val_file: TokenFile | Joined | None = None

    def prepare(self, progress: Progress | None = None, *, validation: bool = True) -> None:
        """Encode what is not encoded yet; without `validation`, what is for training alone.

        Raises:
            UserError: the training data, or those of one source of a mixture, are shorter than one row.
        """
        data, training = self.config.data, self.config.training
        if validation:
            self.val_file = validation_file(data, self.tokenizer, training.seed, progress=progress)
        if not data.streaming:
            self.train_files = training_files(
                data, self.tokenizer, training.seed, needed=training.seq_len + 1, progress=progress
            )
        if self.val_file is not None and self.val_file.fingerprint in {
            file.fingerprint for file in self.train_files
        }:
            raise UserError(
                "data.val_dataset: it has the very tokens that are trained on. Give other data, or take it out and data.val_fraction is held out."
            )

    def start_at(self, batch: int, cursor: list[int] | None) -> None:
        """Go on at micro-batch `batch`; a stream from the place that its checkpoint stored."""
        self.first_batch = batch
        if cursor is not None:
            self.cursor = Cursor.from_plain(cursor)

    def fingerprints(self) -> dict[str, str]:
        """What identifies the data: two runs with equal ones see the same tokens. A hub dataset is known by its name alone."""
        assert self.val_file is not None, "prepare() makes the validation file"
        data = self.config.data
        train = (
            training_fingerprint(data, self.train_files)
            if self.train_files
            else source_fingerprint(data, "train")[:12]
        )
        return {"train": train, "val": self.val_file.fingerprint}

    def train_dataloader(self) -> DataLoader[Batch]:
        """The micro-batches from `first_batch` to the end of the run."""
        training = self.config.training
        steps = range(self.first_batch, training.max_steps * training.grad_accum_steps)
        if not self.train_files:
            return self._loader(
                StreamBatches(self.config, self.tokenizer, self._share(), steps, self.cursor)
            )
        shape, data = RowShape.of(self.config, self.tokenizer), self.config.data
        return self._loader(
            IndexedBatches(
                self.train_files, shape, data.order, training.seed, self._share(), weights_of(data)
            ),
            steps,
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation rows, at most training.val_batches batches of them."""
        assert self.val_file is not None, "prepare() makes the validation file"
        shape = RowShape.of(self.config, self.tokenizer)
        batches = ValidationBatches(
            self.val_file, shape, self._share(), self.config.training.val_batches
        )
        return DataLoader(batches, batch_size=None)

    def inspect_rows(self) -> Iterator[list[InspectedRow]]:
        """The rows of the run in order, one at a time, each with its source and the micro-batch that it is in."""
        place = 0
        for k, batch in enumerate(self.train_dataloader()):
            for i in range(len(batch["input_ids"])):
                documents = batch["document_ids"][i].tolist() if "document_ids" in batch else None
                heading = f"row {place}, micro-batch {k}: {self._source_of_row(batch, i)}"
                inputs, labels = batch["input_ids"][i].tolist(), batch["labels"][i].tolist()
                yield [InspectedRow(heading, inputs, labels, documents)]
                place += 1

    def _source_of_row(self, batch: Batch, i: int) -> str:
        """The dataset that row `i` of a batch was read from, and its first token there."""
        settings = self.config.data
        if not self.train_files:
            return printable(
                settings.dataset
            )  # a stream records where a window of rows began, not each row
        source, start = batch["origin"][i] if len(self.train_files) > 1 else (0, batch["origin"][i])
        name = settings.dataset if settings.mix is None else settings.mix[source].dataset
        return f"{printable(name)} from token {start}"


class ExampleBatches(Dataset[Batch]):
    """Micro-batches of examples that were packed into rows once; item k depends on (seed, k) and the rows, and on nothing else."""

    def __init__(
        self, rows: Sequence[Sequence[Example]], config: Config, pad_id: int, share: Share
    ):
        self.rows, self.pad_id, self.share = rows, pad_id, share
        self.seq_len, self.packed = config.training.seq_len, config.data.packing == "packed"
        self.order, self.seed = config.data.order, config.training.seed
        self._permutation: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __getitem__(self, k: int) -> Batch:
        rows = [self.rows[self._row(place)] for place in self.share.places(k)]
        return self.batch(rows) | {"origin": self.places_of(rows)}

    def places_of(self, rows: Sequence[Any]) -> list[Any]:
        """Where the rows of a batch were read from, for messages."""
        return [[example.place for example in row] for row in rows]

    def batch(self, rows: Sequence[Sequence[Example]]) -> Batch:
        """`input_ids` and `labels` (B, T) int64; with several examples a row also `document_ids` (B, T)."""
        inputs, labels, documents = zip(
            *(row_of_examples(row, self.seq_len, self.pad_id) for row in rows), strict=True
        )
        batch = {
            "input_ids": torch.from_numpy(np.stack(inputs)),
            "labels": torch.from_numpy(np.stack(labels)),
        }
        return batch | (
            {"document_ids": torch.from_numpy(np.stack(documents))} if self.packed else {}
        )

    def shown_rows(self) -> Iterator[list["InspectedRow"]]:
        """The rows of the run in their order, for people: what stands in each, under one heading or several."""
        for place in count():
            yield self.shown(
                f"row {place}, micro-batch {place // self.share.size}",
                self.rows[self._row(place)],
                place,
            )

    def shown(self, heading: str, row: Any, place: int) -> list["InspectedRow"]:
        """The row at `place`, for people."""
        inputs, labels, documents = (
            part.tolist() for part in row_of_examples(row, self.seq_len, self.pad_id)
        )
        last = len(row) - 1  # padding counts as a document of its own
        return [
            InspectedRow(
                f"{heading}: {_named([example.place for example in row])}",
                inputs,
                labels,
                [min(number, last) for number in documents],
            )
        ]

    def _row(self, place: int) -> int:
        """The row that stands at `place` in the sequence of all rows of the run."""
        if self.order == "random":
            return int(np.random.default_rng((self.seed, _WINDOWS, place)).integers(len(self.rows)))
        passes, row = divmod(place, len(self.rows))
        if self.order == "sequential":
            return row
        if self._permutation[0] != passes:
            self._permutation = (
                passes,
                np.random.default_rng((self.seed, _SHUFFLE, passes)).permutation(len(self.rows)),
            )
        return int(self._permutation[1][row])


class ValidationExamples(ExampleBatches):
    """The validation rows in their order, this rank's share of them."""

    def __init__(
        self, rows: Sequence[Sequence[Example]], config: Config, pad_id: int, share: Share
    ):
        super().__init__(rows, config, pad_id, share)
        batches, limit = -(-len(rows) // (share.size * share.world)), config.training.val_batches
        self.n_batches = batches if limit is None else min(limit, batches)

    def __len__(self) -> int:
        return self.n_batches

    def __getitem__(self, k: int) -> Batch:
        if k >= self.n_batches:
            raise IndexError(k)  # ends a plain `for batch in batches`
        # A place beyond the last row gives a row of padding, so that all ranks do the same number of batches.
        return self.batch(
            [self.rows[place] if place < len(self.rows) else () for place in self.share.places(k)]
        )


class RowsInMemory(RunData):
    """The data of a run whose rows are all in memory, with the interface of `PretrainData`; `notes` is what a user should know of them, a line each."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.first_batch = 0
        self.notes: list[str] = []

    @abstractmethod
    def train_batches(self) -> "ExampleBatches":
        """The micro-batches of the run, by their number."""

    @abstractmethod
    def val_batches(self) -> "ExampleBatches":
        """The validation rows, at most training.val_batches batches of them."""

    def start_at(self, batch: int, cursor: list[int] | None) -> None:
        """Go on at micro-batch `batch`; rows that are all in memory need no cursor."""
        self.first_batch = batch

    def train_dataloader(self) -> DataLoader[Batch]:
        """The micro-batches from `first_batch` to the end of the run."""
        training = self.config.training
        return self._loader(
            self.train_batches(),
            range(self.first_batch, training.max_steps * training.grad_accum_steps),
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """The batches of `val_batches`, in this process."""
        return DataLoader(self.val_batches(), batch_size=None)

    def inspect_rows(self) -> Iterator[list[InspectedRow]]:
        """The rows of the run in order, each as one row to print or several."""
        return self.train_batches().shown_rows()


class SFTData(RowsInMemory):
    """The batches of one run of supervised fine-tuning.

    `prepare` reads, encodes and packs all rows, and must be called before the loaders are.

    Args:
        config: the settings; data.task, data.template, data.packing and training.train_on say what an example is.
        tokenizer: what the rows are encoded with.
        template: how conversations are written; None: as data.template says.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, *, template: Template | None = None):
        super().__init__(config, tokenizer)
        self.template = template or make_template(config.data.template, tokenizer)
        self.train_examples: list[Example] = []
        self.val_examples: list[Example] = []

    def prepare(self) -> None:
        """Read and encode the rows of both splits.

        Raises:
            UserError: as `rows.examples`.
        """
        note = resolve_dataset(self.config.data)[1]
        self.train_examples, train = self._examples("train")
        self.val_examples, val = self._examples("val")
        shared = shared_examples(self.train_examples, self.val_examples)
        warning = f"warning: {shared} validation rows are training rows too; val_loss will look better than it is"
        self.notes = [
            *([note] if note else []),
            *train.notes(),
            *val.notes(),
            *([warning] if shared else []),
        ]
        # With train_on all no target says where a question ends.
        asked = (
            shared_questions(self.train_examples, self.val_examples)
            if self.config.training.train_on == "response"
            else 0
        )
        if asked > shared:
            self.notes.append(
                f"warning: {asked} validation rows ask what training rows ask; val_loss will look better than on new questions"
            )

    def describe(self) -> str:
        """One line on what is trained on and validated on."""
        data, training = self.config.data, self.config.training
        rows = self._rows(self.train_examples)
        inputs = sum(len(example.ids) - 1 for example in self.train_examples)
        targets = sum(int(example.trained.sum()) for example in self.train_examples)
        sizes = f"train {len(self.train_examples)} examples in {len(rows)} rows of {training.seq_len} ({inputs / len(rows) / training.seq_len:.0%} full)"
        learned = f"{targets / inputs:.0%} of the tokens trained (train_on {training.train_on})"
        return f"data: {printable(data.dataset)}: {sizes}, {learned}, validation {len(self.val_examples)} examples; template {self.template.name}"

    def fingerprints(self) -> dict[str, str]:
        """What identifies the data: two runs with equal ones see the same tokens and targets."""
        return {
            "train": fingerprint_of_examples(self.train_examples),
            "val": fingerprint_of_examples(self.val_examples),
        }

    def train_batches(self) -> ExampleBatches:
        return ExampleBatches(
            self._rows(self.train_examples), self.config, self.tokenizer.pad_id, self._share()
        )

    def val_batches(self) -> ExampleBatches:
        return ValidationExamples(
            self._rows(self.val_examples), self.config, self.tokenizer.pad_id, self._share()
        )

    def _examples(self, which: Which) -> tuple[list[Example], Report]:
        data, training = self.config.data, self.config.training
        return build_examples(
            data,
            which,
            training.seed,
            self.template,
            self.tokenizer,
            training.seq_len,
            train_on=training.train_on,
            to_conversation=conversation_parser(data),
            built_in=requested_built_in_rows(data),
        )

    def _rows(self, made: list[Example]) -> list[list[Example]]:
        """The examples of each row."""
        if self.config.data.packing == "padded":
            return [[example] for example in made]
        return [
            [made[number] for number in row]
            for row in pack_examples(
                [len(example.ids) - 1 for example in made], self.config.training.seq_len
            )
        ]


def fingerprint_of_examples(made: list[Example]) -> str:
    digest = hashlib.sha256()
    for example in made:
        digest.update(b"%d " % len(example.ids) + example.ids.tobytes() + example.trained.tobytes())
    return digest.hexdigest()[:12]


def _named(places: Sequence[str]) -> str:
    """The places of the examples in a row, on one line."""
    more = f" and {len(places) - NAMED_PLACES} more" if len(places) > NAMED_PLACES else ""
    return ", ".join(places[:NAMED_PLACES]) + more


if __name__ == "__main__":
    print(f"error: {MOVED}", file=sys.stderr)
    sys.exit(2)
