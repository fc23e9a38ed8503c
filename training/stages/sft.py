"""Supervised fine-tuning: the data module; a row holds one or several examples, each a question and its answer.

examples ─▶ rows, packed or one example each ─▶ row order ─▶ micro-batch (B, T)
"""

from collections.abc import Iterator, Sequence
from functools import partial

from data import RunData
from tinylm.common.errors import printable
from tinylm.config.schema import Config
from tinylm.eval.tasks.data import conversation_parser, requested_built_in_rows
from tinylm.rows.inspect import InspectedRow
from tinylm.rows.row_files import resolve_dataset
from tinylm.rows.sft import (
    build_examples,
    fingerprint_of_examples,
    shared_examples,
    shared_questions,
)
from tinylm.rows.skipped_rows import RowReport, list_places
from tinylm.rows.template_factory import make_template
from tinylm.rows.templates import Template
from tinylm.text.splits import Which
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.batches import Batch, RowDataset, collate_examples
from tinylm.tokens.packing import Example, fill_rows, row_of_examples
from tinylm.tokens.row_order import Share


class SFTData(RunData):
    """The batches of a run of supervised fine-tuning.

    Args:
        config: the settings; data.task, data.template, data.packing and training.train_on define the examples.
        tokenizer: encodes the rows.
        template: how conversations are formatted; None: as data.template says.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, *, template: Template | None = None):
        super().__init__(config, tokenizer)
        self.template = template or make_template(config.data.template, tokenizer)
        self.notes: list[str] = []
        """what the user should know about the rows, a line each"""
        self.train_examples: list[Example] = []
        self.val_examples: list[Example] = []

    def prepare(self) -> None:
        """Read and encode the rows of both splits.

        Raises:
            UserError: see `build_examples`.
        """
        note = resolve_dataset(self.config.data)[1]
        self.train_examples, train = self._examples("train")
        self.val_examples, val = self._examples("val")
        self.notes = [note] if note else []
        self.notes += [*train.notes(), *val.notes()]
        shared = shared_examples(self.train_examples, self.val_examples)
        if shared:
            self.notes.append(
                f"warning: {shared} validation rows are also training rows; val_loss will be too low"
            )
        if self.config.training.train_on != "response":
            return  # no label shows where a question ends
        shared_prompts = shared_questions(self.train_examples, self.val_examples)
        if shared_prompts > shared:
            self.notes.append(
                f"warning: {shared_prompts} validation rows have a question of a training row; "
                "val_loss will be lower than on new questions"
            )

    def describe(self) -> str:
        """One line about the training and validation data."""
        data, training = self.config.data, self.config.training
        n_rows = len(self.rows_of(self.train_examples))
        n_inputs = sum(len(example.ids) - 1 for example in self.train_examples)
        n_targets = sum(int(example.trained.sum()) for example in self.train_examples)
        full = n_inputs / n_rows / training.seq_len
        return (
            f"data: {printable(data.dataset)}: train {len(self.train_examples)} examples in "
            f"{n_rows} rows of {training.seq_len} ({full:.0%} full), {n_targets / n_inputs:.0%} of "
            f"the tokens trained (train_on {training.train_on}), validation "
            f"{len(self.val_examples)} examples; template {self.template.name}"
        )

    def fingerprints(self) -> dict[str, str]:
        """Identify the data: two runs with equal fingerprints see the same tokens and targets."""
        return {
            "train": fingerprint_of_examples(self.train_examples),
            "val": fingerprint_of_examples(self.val_examples),
        }

    def train_dataset(self, share: Share | None = None) -> RowDataset:
        return self.training_rows(self.rows_of(self.train_examples), self.collate(), share)

    def val_dataset(self, share: Share | None = None) -> RowDataset:
        return self.validation_rows(self.rows_of(self.val_examples), self.collate(), share)

    def collate(self) -> "partial[Batch]":
        """`collate_examples` with the settings of the run."""
        return partial(
            collate_examples,
            seq_len=self.config.training.seq_len,
            pad_id=self.tokenizer.pad_id,
            packed=self.config.data.packing == "packed",
        )

    def rows_of(self, examples: list[Example]) -> list[list[Example]]:
        """The examples of each row."""
        return fill_rows(examples, self.config.training.seq_len, self.config.data.packing)

    def inspect_row(self, heading: str, row: list[Example], place: int) -> Iterator[InspectedRow]:
        """A row to print, with the places of its examples in the data."""
        yield inspect_examples(
            heading, row, self.config.training.seq_len, pad_id=self.tokenizer.pad_id
        )

    def _examples(self, which: Which) -> tuple[list[Example], RowReport]:
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


def inspect_examples(
    heading: str, row: Sequence[Example], seq_len: int, pad_id: int
) -> InspectedRow:
    """A row of examples to print."""
    parts = row_of_examples(row, seq_len, pad_id)
    inputs, labels, documents = (part.tolist() for part in parts)
    last = len(row) - 1  # padding has the number after the last document
    places = list_places([example.place for example in row])
    documents = [min(number, last) for number in documents]
    return InspectedRow(f"{heading}: {places}", inputs, labels, documents)
