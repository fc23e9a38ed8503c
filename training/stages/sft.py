"""Stage sft: next-token prediction on rows of questions and answers;
a row holds one or several examples.

examples ─▶ rows, packed or one example each ─▶ row order ─▶ micro-batch (B, T)
"""

import logging
import os
from collections.abc import Iterator, Sequence
from functools import partial

from data import RunData
from model import LanguageModule
from tinylm.checkpoint.initial import InitialModel
from tinylm.common.errors import UserError
from tinylm.config.schema import Config
from tinylm.eval.tasks.data import SMOKE, conversation_parser, requested_built_in_rows
from tinylm.eval.tasks.table import TASKS
from tinylm.model.hf_model import HFSeq2Seq
from tinylm.rows.inspect import InspectedRow
from tinylm.rows.row_files import find_rows, resolve_dataset
from tinylm.rows.sft import (
    build_examples,
    count_shared_examples,
    count_shared_prompts,
    fingerprint_of_examples,
)
from tinylm.rows.skipped_rows import RowReport, list_locations
from tinylm.rows.template_factory import make_template
from tinylm.rows.templates import Template
from tinylm.text.splits import Which
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.example_rows import (
    Example,
    collate_examples,
    fill_rows,
    n_answers,
    row_of_examples,
)
from tinylm.tokens.packing import Batch, RankShare, RowDataset
from training.build import build_language_model
from training.context import RunContext
from training.resume import ResumeState
from training.stage import Stage
from training.stages.pretrain import learn_tokenizer

logger = logging.getLogger(__name__)


class SFTData(RunData):
    """The batches of a run of supervised fine-tuning.

    Args:
        config: the settings; data.task, data.template,
            data.packing and training.train_on define the examples.
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
        self.system = train.most_common_system
        self.notes = [note] if note else []
        self.notes += [*train.notes(), *val.notes()]
        shared = count_shared_examples(self.train_examples, self.val_examples)
        if shared:
            self.notes.append(
                f"warning: {shared} validation rows are also training rows; "
                "val_loss will be too low"
            )
        if self.config.training.train_on != "response":
            return  # no label shows where a question ends
        shared_prompts = count_shared_prompts(self.train_examples, self.val_examples)
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
            f"data: {data.dataset}: train {len(self.train_examples)} examples in "
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

    def train_dataset(self, share: RankShare | None = None) -> RowDataset:
        return self.training_rows(self.rows_of(self.train_examples), self.collate(), share)

    def val_dataset(self, share: RankShare | None = None) -> RowDataset:
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
        """A row to print, with the locations of its examples in the data."""
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
    locations = list_locations([example.location for example in row])
    documents = [min(number, last) for number in documents]
    return InspectedRow(f"{heading}: {locations}", inputs, labels, documents)


def find_data(config: Config) -> None:
    """Raise a UserError if the rows are not there or cannot be read."""
    if not requested_built_in_rows(config.data):
        find_rows(config.data, config.training.seed)


def open_data(context: RunContext, tokenizer: Tokenizer) -> SFTData:
    """The rows of both splits, read and encoded; logs their number and the skipped rows."""
    data = SFTData(context.config, tokenizer)
    try:
        data.prepare()
    except UserError as error:
        if not _is_on_hub(context.config):
            raise
        task = context.config.data.task
        fix = f"For task {task}: data.dataset=PATH, or data.dataset={SMOKE} for a few built-in rows"
        raise error.within(fix=f"{error.fix}. {fix}".removeprefix(". ")) from None
    log_contents(data.describe(), data.notes)
    return data


def log_contents(description: str, notes: Sequence[str]) -> None:
    """Log the contents of a data module, and notes for the user."""
    for line in (description, *notes):
        logger.info(line)


def _is_on_hub(config: Config) -> bool:
    """Whether the rows come from the hub dataset of data.task."""
    task = config.data.task
    hub = TASKS[task].hub if task else None
    return (
        hub is not None and config.data.dataset == hub.dataset and not os.path.exists(hub.dataset)
    )


def build_module(
    context: RunContext, data: RunData, resume: ResumeState | None, initial: InitialModel | None
) -> LanguageModule:
    """The language model; logs how an encoder-decoder reads conversations."""
    module = build_language_model(context, data, resume, initial)
    if isinstance(module.decoder, HFSeq2Seq):
        assert isinstance(data, SFTData)
        n_several = sum(n_answers(example) > 1 for example in data.train_examples)
        if n_several:
            logger.info(
                f"{n_several} rows have more than one answer: "
                "an encoder-decoder learns the last one and reads the others"
            )
    return module


SFT = Stage(
    name="sft",
    find_data=find_data,
    learn_tokenizer=learn_tokenizer,
    open_data=open_data,
    build_module=build_module,
    next_command="python infer.py --ckpt {model} --chat",
)
