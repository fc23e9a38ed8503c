"""Preferences (DPO): the data module; a row is a prompt with a chosen and a rejected answer."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from data import (
    Batch,
    ExampleBatches,
    RowsInMemory,
    Share,
    ValidationExamples,
    fingerprint_of_examples,
)
from tinylm.common.errors import UserError, printable
from tinylm.config.schema import Config
from tinylm.rows.inspect import InspectedRow
from tinylm.rows.preferences import PairReport, PreferencePair, build_pairs
from tinylm.rows.row_files import resolve_dataset
from tinylm.rows.sft import shared_examples
from tinylm.rows.template_factory import make_template
from tinylm.text.splits import Which
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.packing import Example, row_of_examples


class PairBatches(ExampleBatches):
    """Micro-batches of preferences, a pair a row, in the order that examples have; each answer stands behind its prompt."""

    def places_of(self, rows: Sequence[Any]) -> list[Any]:
        return [pair.chosen.place for pair in rows]

    def batch(self, rows: Sequence[Any]) -> Batch:
        """Ids and labels (B, T) int64 of both answers, and what is known of them under the reference, (B,); `()` gives padding."""
        batch: Batch = {}
        known = self.rows[0].reference is not None
        for number, name in enumerate(("chosen", "rejected")):
            inputs, labels, _ = zip(
                *(
                    row_of_examples(row[number : number + 1], self.seq_len, self.pad_id)
                    for row in rows
                ),
                strict=True,
            )
            batch |= {
                f"{name}_ids": torch.from_numpy(np.stack(inputs)),
                f"{name}_labels": torch.from_numpy(np.stack(labels)),
            }
            if known:
                batch[f"{name}_reference"] = torch.tensor(
                    [row.reference[number] if row else 0.0 for row in rows]
                )
        return batch

    def shown(self, heading: str, row: Any, place: int) -> list["InspectedRow"]:
        chosen, rejected = (
            super(PairBatches, self).shown(f"{heading}, {name}", [answer], place)
            for name, answer in zip(PreferencePair._fields, row[:2], strict=False)
        )
        return [*chosen, *rejected]


class ValidationPairs(PairBatches, ValidationExamples):
    """Pairs in their order, this rank's share of them."""


class PreferenceData(RowsInMemory):
    """The batches of one run on preferences.

    Args:
        config: the settings; data.template says how prompts and answers are written.
        tokenizer: what the rows are encoded with.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer):
        super().__init__(config, tokenizer)
        self.template = make_template(config.data.template, tokenizer)
        self.train_pairs: list[PreferencePair] = []
        self.val_pairs: list[PreferencePair] = []

    def prepare(self) -> None:
        """Read and encode the rows of both splits.

        Raises:
            UserError: as `rows.pairs`.
        """
        if note := resolve_dataset(self.config.data)[1]:
            raise UserError(
                f"{note.partition(';')[0]}. Give a file of preferences, such as data/tiny_preferences.jsonl."
            )
        self.train_pairs, train = self._pairs("train")
        self.val_pairs, val = self._pairs("val")
        shared = shared_examples(
            [pair.chosen for pair in self.train_pairs], [pair.chosen for pair in self.val_pairs]
        )
        warning = f"warning: {shared} validation prompts with their chosen answers are training rows too; val_loss will look better than it is"
        self.notes = [*train.notes(), *val.notes(), *([warning] if shared else [])]

    def describe(self) -> str:
        """One line on what is trained on and validated on."""
        targets = [int(example.trained.sum()) for example in _answers(self.train_pairs)]
        sizes = f"train {len(self.train_pairs)} pairs of answers of {sum(targets) / len(targets):.0f} tokens, validation {len(self.val_pairs)} pairs"
        return (
            f"data: {printable(self.config.data.dataset)}: {sizes}; template {self.template.name}"
        )

    def fingerprints(self) -> dict[str, str]:
        """What identifies the data: two runs with equal ones see the same tokens and targets."""
        return {
            "train": fingerprint_of_examples(_answers(self.train_pairs)),
            "val": fingerprint_of_examples(_answers(self.val_pairs)),
        }

    def train_batches(self) -> ExampleBatches:
        return PairBatches(self.train_pairs, self.config, self.tokenizer.pad_id, self._share())

    def val_batches(self) -> ExampleBatches:
        return ValidationPairs(self.val_pairs, self.config, self.tokenizer.pad_id, self._share())

    def all_batches(self) -> Iterator[Batch]:
        """All pairs in their order, those of validation last; every process sees them all."""
        made = [*self.train_pairs, *self.val_pairs]
        size = self.config.training.micro_batch_size
        batches = PairBatches(made, self.config, self.tokenizer.pad_id, Share(size))
        return (batches.batch(made[start : start + size]) for start in range(0, len(made), size))

    def add_reference(self, log_probs: np.ndarray) -> None:
        """Give every pair the log-probabilities (n, 2) of its answers under the reference, in the order of `all_batches`."""
        known = iter(log_probs.tolist())
        self.train_pairs = [pair._replace(reference=next(known)) for pair in self.train_pairs]
        self.val_pairs = [pair._replace(reference=next(known)) for pair in self.val_pairs]

    def _pairs(self, which: Which) -> tuple[list[PreferencePair], PairReport]:
        training = self.config.training
        return build_pairs(
            self.config.data, which, training.seed, self.template, self.tokenizer, training.seq_len
        )


def _answers(made: list[PreferencePair]) -> list[Example]:
    """Both examples of each pair."""
    return [example for pair in made for example in (pair.chosen, pair.rejected)]
