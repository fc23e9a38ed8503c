"""LightningDataModules: documents to micro-batches, in a deterministic order
(a pure function of seed and step).

    1. tokens  each source as one token file of N tokens                               PretrainData.prepare
    2. rows    row i of a file: inputs and labels, 2 x (T,), cut from N tokens         tokens/packing.py
    3. order   place of the run ─▶ source and row, from (seed, place) alone            mixture.py, packing.py
    4. batch   the B rows at the places of micro-batch k of this rank, (B, T)          RowDataset
    or         2'-4' of a stream: windows of rows, shuffled by (seed, window), (B, T)  tokens/stream.py

The whole run is one sequence of micro-batches 0, 1, 2, ... and one Lightning epoch; a pass over the
data ends somewhere inside it. A run that resumes at micro-batch k gets the same micro-batches as an
uninterrupted run, with any number of worker processes. For rows, k is enough; for a stream, the
position is in each batch (`cursor`) and in the checkpoint.

The data of fine-tuning, preferences and the verifier are rows as well, each in `training/stages/`.
"""

import signal
import sys
from collections.abc import Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

# tokens.mixture, sampled_documents, shared_runs, stream and workers are imported at their first use
from tinylm import tokens
from tinylm.common.console import OnProgress
from tinylm.common.errors import UserError
from tinylm.common.platform import STOP_SIGNALS, end_with_parent
from tinylm.config.schema import Config
from tinylm.text.data_source import DataSource, data_sources
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.packing import (
    Batch,
    Collate,
    RankShare,
    RowDataset,
    RowOrder,
    TokenRows,
    count_batches,
    count_rows,
    row_collate,
    validation_order,
)
from tinylm.tokens.run_files import token_files
from tinylm.tokens.token_file import JoinedFiles, TokenFile

if TYPE_CHECKING:
    from tinylm.tokens.sampled_documents import Located, SampledDocuments

MOVED = (
    "data.py only holds the data modules: use `python train.py --config ... --show-rows N` or "
    "`python finetune.py --config ... --show-rows N`"
)


class RunData(L.LightningDataModule):
    """The part that the data modules of all stages share: the loaders,
    and where a resumed run starts.

    A stage defines `prepare`, `train_dataset`, `val_dataset` and `fingerprints`. `prepare` must be
    called before the others.
    """

    first_batch = 0
    system: str | None = None
    """the most common system turn of the training rows, which answers are generated with"""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer

    def start_at(self, batch: int, cursor: list[int] | None) -> None:
        """Start at micro-batch `batch`; `cursor` is the position in a stream
        that the checkpoint has.
        """
        self.first_batch = batch

    def rank_share(self) -> RankShare:
        """The part of each micro-batch that this rank takes."""
        size = self.config.training.micro_batch_size
        if self.trainer is None:
            return RankShare(size)
        return RankShare(size, self.trainer.global_rank, self.trainer.world_size)

    def validation_note(self) -> str | None:
        """What the user should know about the first val_loss; None: nothing."""
        return None

    def located_rows(self) -> "list[Located]":
        """Where each training row is, and its token ids."""
        return []

    def sampled_documents(self, most: int) -> "SampledDocuments":
        """Training documents, or rows, of about `most` tokens, evenly chosen; none of a stream."""
        return tokens.sampled_documents.sample_rows(self.located_rows(), most)

    def training_rows(
        self, rows: Sequence[Any], collate: Collate, share: RankShare | None = None
    ) -> RowDataset:
        """Rows in memory, in the training order."""
        order = RowOrder(self.config.data.order, len(rows), self.config.training.seed)
        return RowDataset(rows, order, collate, share or self.rank_share())

    def validation_rows(
        self, rows: Sequence[Any], collate: Collate, share: RankShare | None = None
    ) -> RowDataset:
        """Rows in their own order, at most training.val_batches batches;
        the last one is filled with padding.
        """
        share = share or self.rank_share()
        n_batches = count_batches(len(rows), share, self.config.training.val_batches)
        return RowDataset(rows, partial(validation_order, len(rows)), collate, share, n_batches)

    def mixed_rows(
        self, sources: Sequence[Sequence[Any]], collate: Collate, share: RankShare | None = None
    ) -> RowDataset:
        """The rows of the sources of data.mix in the training order."""
        data, seed = self.config.data, self.config.training.seed
        weights = [part.weight for part in data.mix or ()]
        share = share or self.rank_share()
        mixture = tokens.mixture
        return mixture.mixture_dataset(sources, weights, data.order, seed, collate, share)

    @cached_property
    def source_rows(self) -> list[float]:
        """Rows of one pass over each source of data.mix, or over the only one; [] for a stream, whose
        length is not known.
        """
        rows = self.train_dataset(RankShare(1)).rows
        return [len(rows)] if self.config.data.mix is None else list(map(len, rows.sources))

    def source_passes(self, step: int, world_size: int) -> list[float]:
        """How often each source of data.mix was read after `step`; [] if there are not several."""
        mix, training = self.config.data.mix or (), self.config.training
        if len(mix) < 2:
            return []
        n_rows = step * training.micro_batch_size * training.grad_accum_steps * world_size
        weights = [part.weight for part in mix]
        return tokens.mixture.source_passes(weights, training.seed, self.source_rows, n_rows)

    def train_dataloader(self) -> DataLoader[Batch]:
        """The micro-batches from `first_batch` to the end of the run."""
        training = self.config.training
        n_workers = self.config.data.num_workers
        dataset = self.train_dataset()
        steps = range(self.first_batch, training.max_steps * training.grad_accum_steps)
        settings: dict[str, Any] = {
            "batch_size": None,
            "sampler": None if isinstance(dataset, IterableDataset) else steps,
            "pin_memory": torch.cuda.is_available(),
        }
        if not n_workers:
            return DataLoader(dataset, **settings)
        return tokens.workers.WorkerLoader(
            dataset, num_workers=n_workers, worker_init_fn=start_worker, **settings
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation batches, made in this process."""
        return DataLoader(self.val_dataset(), batch_size=None)


def start_worker(worker: int) -> None:
    """Keep a worker process alive after a signal that is sent to all, such as Ctrl-C:
    the step still needs it. It ends with the run, also if that is killed.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


class PretrainData(RunData):
    """The batches of a pretraining run: packed rows of token files,
    or of documents that are streamed.
    """

    cursor: list[int] | None = None
    train_sources: tuple[DataSource, ...] = ()
    val_sources: tuple[DataSource, ...] = ()
    train_files: tuple[TokenFile, ...] = ()
    """one for each source; none for a stream"""
    val_files: tuple[TokenFile, ...] = ()
    val_file: TokenFile | JoinedFiles | None = None
    """all of them as one"""

    def prepare(self, on_progress: OnProgress | None = None, *, validation: bool = True) -> None:
        """Make the token files that do not exist yet; without `validation`,
        only the training files.

        Raises:
            UserError: the training data, or one source of a mixture, are shorter than one row.
        """
        data, training = self.config.data, self.config.training
        tokenizer, folder = self.tokenizer, data.cache_dir
        if validation:
            self.val_sources = data_sources(data, "val", training.seed)
            files = token_files(self.val_sources, tokenizer, folder, on_progress=on_progress)
            self.val_files = files
            self.val_file = files[0] if len(files) == 1 else JoinedFiles(files)
        self.train_sources = data_sources(data, "train", training.seed)
        if not data.streaming:
            needed = training.seq_len + 1
            self.train_files = token_files(
                self.train_sources, tokenizer, folder, needed=needed, on_progress=on_progress
            )
        trained = {file.fingerprint for file in self.train_files}
        if self.val_file is not None and self.val_file.fingerprint in trained:
            raise UserError(
                "data.val_dataset",
                "has exactly the tokens of the training data",
                "Give other data, or remove it to hold out data.val_fraction",
            )

    def fingerprints(self) -> dict[str, str]:
        """Identify the data: runs with equal fingerprints see the same tokens.
        A hub dataset is known by its name.
        """
        assert self.val_file is not None, "prepare() makes the validation file"
        if not self.train_files:
            train = self.train_sources[0].text_split().text_source.fingerprint[:12]
        elif self.config.data.mix is None:
            train = self.train_files[0].fingerprint
        else:
            weights = [part.weight for part in self.config.data.mix]
            of_files = [file.fingerprint for file in self.train_files]
            train = tokens.mixture.mixture_fingerprint(weights, of_files)
        return {"train": train, "val": self.val_file.fingerprint}

    def validation_note(self) -> str | None:
        """Whether validation documents are in the training text; not known of a stream."""
        if not self.train_files:
            return None
        return tokens.shared_runs.note_on_validation(self.train_files, self.val_files)

    def sampled_documents(self, most: int) -> "SampledDocuments":
        names = [source.name for source in self.train_sources]
        files = list(zip(names, self.train_files, strict=False))  # a stream has no files
        return tokens.sampled_documents.sample_files(files, most)

    def start_at(self, batch: int, cursor: list[int] | None) -> None:
        super().start_at(batch, cursor)
        self.cursor = cursor

    def train_dataset(self, share: RankShare | None = None) -> Dataset[Batch]:
        """Rows of the token files in the order of the run, or the stream from the cursor on."""
        data, training = self.config.data, self.config.training
        share = share or self.rank_share()
        if not self.train_files:
            steps = range(self.first_batch, training.max_steps * training.grad_accum_steps)
            cursor = tokens.stream.Cursor(*(self.cursor or ()))
            return tokens.stream.StreamDataset(self.config, self.tokenizer, share, steps, cursor)
        # A random row may start at any token.
        stride = 1 if data.order == "random" else data.stride or training.seq_len
        collate = row_collate(self.tokenizer, training.seq_len, document_mask=data.document_mask)
        pad_id = self.tokenizer.pad_id
        if data.mix is None:  # every place of the run is of the one source
            rows = TokenRows(self.train_files[0], training.seq_len, stride, pad_id)
            return RowDataset(rows, RowOrder(data.order, len(rows), training.seed), collate, share)
        is_one = len(data.mix) == 1
        sources = [
            TokenRows(file, training.seq_len, stride, pad_id, None if is_one else number)
            for number, file in enumerate(self.train_files)
        ]
        return self.mixed_rows(sources, collate, share)

    @cached_property
    def source_rows(self) -> list[float]:
        """Of the token files; random rows are a pass when they have as many tokens."""
        data, seq_len = self.config.data, self.config.training.seq_len
        if data.order == "random":
            return [len(file) / seq_len for file in self.train_files]
        stride = data.stride or seq_len
        return [count_rows(len(file), seq_len, stride) for file in self.train_files]

    def val_dataset(self, share: RankShare | None = None) -> RowDataset:
        """Every validation token as a target once, whatever the stride of training."""
        assert self.val_file is not None, "prepare() makes the validation file"
        seq_len = self.config.training.seq_len
        rows = TokenRows(self.val_file, seq_len, seq_len, self.tokenizer.pad_id)
        collate = row_collate(self.tokenizer, seq_len, document_mask=self.config.data.document_mask)
        return self.validation_rows(rows, collate, share)


if __name__ == "__main__":
    print(f"error: {MOVED}", file=sys.stderr)
    sys.exit(2)
