"""Stage sft: next-token prediction on rows of questions and answers;
a row holds one or several examples.

examples ─▶ rows, packed or one example each ─▶ row order ─▶ micro-batch (B, T)
"""

import logging
import os
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain

import numpy as np

from data import RunData
from model import LanguageModule

# tokens.mixture is imported for data.mix
from tinylm import tokens
from tinylm.checkpoint.initial import InitialModel
from tinylm.common.errors import UserError
from tinylm.config.schema import SMOKE, Config
from tinylm.eval.tasks.data import requested_built_in_rows
from tinylm.eval.tasks.examples import source_examples
from tinylm.eval.tasks.table import TASKS
from tinylm.model.hf_model import HFSeq2Seq
from tinylm.rows.inspect import InspectedRow
from tinylm.rows.row_files import resolve_dataset
from tinylm.rows.row_sources import find_rows
from tinylm.rows.sft import (
    count_shared_examples,
    count_shared_prompts,
    fingerprint_of_examples,
)
from tinylm.rows.skipped_rows import list_locations, most_common_system
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.example_rows import (
    Example,
    collate_examples,
    fill_rows,
    n_answers,
    row_of_examples,
)
from tinylm.tokens.packing import Batch, RankShare, RowDataset
from tinylm.tokens.run_files import name_of
from training.build import build_language_model
from training.context import RunContext
from training.resume import ResumeState
from training.run import Stage
from training.stages.pretrain import learn_tokenizer

logger = logging.getLogger(__name__)


class SFTData(RunData):
    """The batches of a run of supervised fine-tuning.

    Args:
        config: the settings; data.task, data.template,
            data.packing and training.train_on define the examples.
        tokenizer: encodes the rows.
        has_encoder: whether they are for an encoder-decoder.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, *, has_encoder: bool = False):
        super().__init__(config, tokenizer)
        self.has_encoder = has_encoder
        self.notes: list[str] = []
        """what the user should know about the rows, a line each"""
        self.train_examples: list[Example] = []
        self.by_source: list[list[Example]] = []
        """the training examples of each source"""
        self.val_examples: list[Example] = []

    def prepare(self) -> None:
        """Read and encode the rows of both splits.

        Raises:
            UserError: see `build_examples`.
        """
        train = source_examples(self.config, "train", self.tokenizer, self.has_encoder)
        val = source_examples(self.config, "val", self.tokenizer, self.has_encoder)
        self.by_source = [found.examples for found in train]
        self.train_examples = list(chain.from_iterable(self.by_source))
        self.val_examples = list(chain.from_iterable(found.examples for found in val))
        self.system = most_common_system([found.report for found in train])
        first = [resolve_dataset(train[0].source.data)[1]] if self.config.data.mix is None else []
        self.notes = [note for note in first if note]
        for found in (*train, *val):
            self.notes += found.report.notes()
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
        n_rows = sum(len(self.rows_of(examples)) for examples in self.by_source)
        n_inputs = sum(len(example.ids) - 1 for example in self.train_examples)
        n_targets = sum(int(example.trained.sum()) for example in self.train_examples)
        full = n_inputs / n_rows / training.seq_len
        templates = {part.template or data.template: None for part in data.mix or ()}
        return (
            f"data: {name_of(data)}: train {len(self.train_examples)} examples in "
            f"{n_rows} rows of {training.seq_len} ({full:.0%} full), {n_targets / n_inputs:.0%} of "
            f"the tokens trained (train_on {training.train_on}), validation "
            f"{len(self.val_examples)} examples; template {', '.join(templates or [data.template])}"
        )

    def located_rows(self) -> list[tuple[str, np.ndarray]]:
        return [(example.location, example.ids) for example in self.train_examples]

    def fingerprints(self) -> dict[str, str]:
        """Identify the data: two runs with equal fingerprints see the same tokens and targets."""
        train = fingerprint_of_examples(self.train_examples)
        if self.config.data.mix is not None:
            weights = [part.weight for part in self.config.data.mix]
            of_sources = [fingerprint_of_examples(examples) for examples in self.by_source]
            train = tokens.mixture.mixture_fingerprint(weights, of_sources)
        return {"train": train, "val": fingerprint_of_examples(self.val_examples)}

    def train_dataset(self, share: RankShare | None = None) -> RowDataset:
        """A row has examples of one source: data.mix gives shares of the rows."""
        if self.config.data.mix is not None:
            sources = [self.rows_of(examples) for examples in self.by_source]
            return self.mixed_rows(sources, self.collate(), share)
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


def open_data(
    context: RunContext, tokenizer: Tokenizer, make_data: type[SFTData] = SFTData
) -> SFTData:
    """The rows of both splits, read and encoded; logs their number and the skipped rows."""
    data = make_data(context.config, tokenizer, has_encoder=context.has_encoder)
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
