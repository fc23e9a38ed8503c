"""Preferences (DPO): the data module; a row is a prompt with a chosen and a rejected answer.

pairs ─▶ row order ─▶ micro-batch: chosen and rejected (B, T), and what the reference model gives them, (B,)
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch

from data import RunData
from tinylm.common.errors import UserError, printable
from tinylm.config.schema import Config
from tinylm.rows.inspect import InspectedRow
from tinylm.rows.preferences import PreferencePair, build_pairs
from tinylm.rows.row_files import resolve_dataset
from tinylm.rows.sft import fingerprint_of_examples, shared_examples
from tinylm.rows.skipped_rows import RowReport
from tinylm.rows.template_factory import make_template
from tinylm.text.splits import Which
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.batches import Batch, RowDataset
from tinylm.tokens.packing import Example, row_of_examples
from tinylm.tokens.row_order import Share
from training.stages.sft import inspect_examples


class PreferenceData(RunData):
    """The batches of a run on preferences.

    Args:
        config: the settings; data.template defines how prompts and answers are formatted.
        tokenizer: encodes the rows.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer):
        super().__init__(config, tokenizer)
        self.template = make_template(config.data.template, tokenizer)
        self.notes: list[str] = []
        """what the user should know about the rows, a line each"""
        self.train_pairs: list[PreferencePair] = []
        self.val_pairs: list[PreferencePair] = []

    def prepare(self) -> None:
        """Read and encode the rows of both splits.

        Raises:
            UserError: see `build_pairs`.
        """
        dataset = self.config.data.dataset
        if resolve_dataset(self.config.data)[0].dataset != dataset:  # the tiny rows, no preferences
            raise UserError(
                ("data.dataset", dataset),
                "has no file of rows",
                "Give a file of preferences, such as data/tiny_preferences.jsonl",
            )
        self.train_pairs, train = self._pairs("train")
        self.val_pairs, val = self._pairs("val")
        self.notes = [*train.notes(), *val.notes()]
        shared = shared_examples(
            [pair.chosen for pair in self.train_pairs], [pair.chosen for pair in self.val_pairs]
        )
        if shared:
            self.notes.append(
                f"warning: {shared} validation prompts with their chosen answers are also training "
                "rows; val_loss will be too low"
            )

    def describe(self) -> str:
        """One line about the training and validation data."""
        n_targets = [int(example.trained.sum()) for example in answers_of(self.train_pairs)]
        return (
            f"data: {printable(self.config.data.dataset)}: train {len(self.train_pairs)} pairs of "
            f"answers of {sum(n_targets) / len(n_targets):.0f} tokens, validation "
            f"{len(self.val_pairs)} pairs; template {self.template.name}"
        )

    def fingerprints(self) -> dict[str, str]:
        """Identify the data: two runs with equal fingerprints see the same tokens and targets."""
        return {
            "train": fingerprint_of_examples(answers_of(self.train_pairs)),
            "val": fingerprint_of_examples(answers_of(self.val_pairs)),
        }

    def train_dataset(self, share: Share | None = None) -> RowDataset:
        return self.training_rows(self.train_pairs, self.collate(), share)

    def val_dataset(self, share: Share | None = None) -> RowDataset:
        return self.validation_rows(self.val_pairs, self.collate(), share)

    def collate(self) -> "partial[Batch]":
        """`collate_preferences` with the settings of the run."""
        return partial(
            collate_preferences,
            seq_len=self.config.training.seq_len,
            pad_id=self.tokenizer.pad_id,
            cached=self.train_pairs[0].reference is not None,
        )

    def all_batches(self) -> Iterator[Batch]:
        """All pairs in their order, validation after training; every rank gets all of them."""
        pairs = [*self.train_pairs, *self.val_pairs]
        size = self.config.training.micro_batch_size
        collate = self.collate()
        for start in range(0, len(pairs), size):
            yield collate(pairs[start : start + size], range(start, start + size))

    def add_reference(self, log_probs: np.ndarray) -> None:
        """Give every pair the log-probabilities (n, 2) of its answers under the reference, in the order of `all_batches`."""
        known = iter(log_probs.tolist())
        self.train_pairs = [pair._replace(reference=next(known)) for pair in self.train_pairs]
        self.val_pairs = [pair._replace(reference=next(known)) for pair in self.val_pairs]

    def inspect_row(self, heading: str, row: PreferencePair, place: int) -> Iterator[InspectedRow]:
        """Both answers to print, each after its prompt."""
        seq_len, pad_id = self.config.training.seq_len, self.tokenizer.pad_id
        for name, example in (("chosen", row.chosen), ("rejected", row.rejected)):
            yield inspect_examples(f"{heading}, {name}", [example], seq_len, pad_id)

    def _pairs(self, which: Which) -> tuple[list[PreferencePair], RowReport]:
        training = self.config.training
        return build_pairs(
            self.config.data, which, training.seed, self.template, self.tokenizer, training.seq_len
        )


def collate_preferences(
    rows: Sequence[PreferencePair | None],
    places: Sequence[int],
    *,
    seq_len: int,
    pad_id: int,
    cached: bool,
) -> Batch:
    """Ids and labels (B, T) int64 of both answers and, if `cached`, their log-probabilities under the reference, (B,)."""
    batch: Batch = {"origin": [None if pair is None else pair.chosen.place for pair in rows]}
    for number, name in enumerate(("chosen", "rejected")):
        examples = [() if pair is None else (pair[number],) for pair in rows]
        filled = [row_of_examples(row, seq_len, pad_id) for row in examples]
        batch[f"{name}_ids"] = torch.from_numpy(np.stack([row[0] for row in filled]))
        batch[f"{name}_labels"] = torch.from_numpy(np.stack([row[1] for row in filled]))
        if cached:
            references = [0.0 if pair is None else pair.reference[number] for pair in rows]
            batch[f"{name}_reference"] = torch.tensor(references)
    return batch


def answers_of(pairs: Sequence[PreferencePair]) -> list[Example]:
    """Both examples of each pair."""
    return [example for pair in pairs for example in (pair.chosen, pair.rejected)]
