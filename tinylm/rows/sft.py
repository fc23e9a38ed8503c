r"""Rows of fine-tuning data: where they come from, what conversation each one is, and the examples they become.

    1. records      .jsonl, .json, .parquet, SMSSpamCollection, a folder or glob of them, or a Hugging Face dataset
                    ─▶ (place, dict), split into training and validation by content                  `read_rows`
    2. conversation a dict ─▶ turns, told by its keys                                                `parse_conversation`
                        {"instruction", "input", "output"}       alpaca; the input may be missing or empty
                        {"prompt", "completion"}                 prompt; also question, and response, answer or target
                        {"messages": [{"role", "content"}]}      messages
                        {"conversations": [{"from", "value"}]}   sharegpt; the turns may have either pair of keys
                        {"label", "text"}                        a line of SMSSpamCollection
    3. examples     a conversation ─▶ tokens and targets, cut to the context                         `build_examples`
    4. pairs        for preferences, in place of 2 and 3: a dict ─▶ a prompt and two answers         `preference_of`
                        {"instruction", "input", "chosen", "rejected"}, {"prompt", "chosen", "rejected"}
                        {"chosen", "rejected"}, each a whole conversation: messages, or text as Anthropic's hh-rlhf has it
                    ─▶ two examples that differ in their answers                                     `pairs`

A row that is none of these is an error that names its file, line and key. A row is held in memory, as are all examples:
fine-tuning data are small. How turns are written is prompts.py's business, how examples fill rows packing.py's.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from tinylm.common.errors import UserError
from tinylm.config.schema import DataConfig
from tinylm.rows.columns import parse_conversation, unread_text_columns
from tinylm.rows.conversation import Conversation
from tinylm.rows.row_files import (
    NAMED_PLACES,
    LocatedRow,
    read_rows,
    split_built_in_rows,
)
from tinylm.rows.templates import Template
from tinylm.text.documents import some_of
from tinylm.text.splits import Which
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.packing import Example


@dataclass
class Report:
    """What became of the rows of a split."""

    which: Which
    seq_len: int
    kept: int = 0
    cut: int = 0
    """of those kept, how many lost the end of an answer"""
    skipped: int = 0
    places: list[str] = field(default_factory=list)
    """where the first skipped rows stand"""
    left_out: dict[str, None] = field(default_factory=dict)
    """columns with text that is in no turn, in their order"""

    @property
    def skipped_rows(self) -> str:
        """The skipped rows in words: how many, why, and the first of them by name."""
        more = ", ..." if self.skipped > len(self.places) else ""
        return f"{self.skipped} rows whose prompts fill the context of {self.seq_len} tokens ({', '.join(self.places)}{more})"

    @property
    def name(self) -> str:
        """The split in words."""
        return "validation" if self.which == "val" else "training"

    def notes(self) -> list[str]:
        """What a user should know of it, a line each."""
        notes = [f"{self.name}: skipped {self.skipped_rows}"] if self.skipped else []
        if self.left_out:
            notes.append(
                f"{self.name}: columns that are not read: {some_of(self.left_out)}; data.columns names those that are"
            )
        return notes + (
            [
                f"{self.name}: {self.cut} of {self.kept} rows lost the end of an answer to the context of {self.seq_len} tokens"
            ]
            if self.cut
            else []
        )


def build_examples(
    data: DataConfig,
    which: Which,
    seed: int,
    template: Template,
    tokenizer: Tokenizer,
    seq_len: int,
    *,
    train_on: Literal["response", "all"],
    to_conversation: Callable[[dict[str, Any]], Conversation] | None = None,
    built_in: Sequence[LocatedRow] = (),
) -> tuple[list[Example], Report]:
    """The examples of a split in the order of its rows, each of at most seq_len inputs, and what was cut and left out.

    Args:
        data: where the rows are.
        which: training or validation.
        seed: decides which rows are held out.
        template: how their conversations are written.
        tokenizer: what they are encoded with.
        seq_len: inputs that a row of a batch has room for.
        train_on: the responses, or every token but the first of an example.
        to_conversation: what makes a conversation of a row; None: its keys tell, or data.rows.
        built_in: rows in place of those that `data` names.

    Raises:
        UserError: as `read_rows`; a row is no conversation; or the prompt of every row fills the context.
    """
    told_by_keys = to_conversation is None
    to_conversation = to_conversation or (lambda row: parse_conversation(row, data))
    kept: list[Example] = []
    report = Report(which, seq_len)
    for place, row in (
        split_built_in_rows(built_in, which) if built_in else read_rows(data, which, seed)
    ):
        try:
            whole = template.encode(to_conversation(row), tokenizer)
        except UserError as problem:
            raise UserError(f"{place}: {problem}") from None
        trained = whole.trained if train_on == "response" else np.arange(len(whole.ids)) > 0
        if told_by_keys:
            report.left_out |= dict.fromkeys(unread_text_columns(row, data))
        # The last token of a row is only a target.
        example = Example(whole.ids[: seq_len + 1], trained[: seq_len + 1], place)
        if example.trained.any():
            kept.append(example)
            report.cut += len(whole.ids) > len(example.ids)
        else:
            report.skipped += 1
            report.places += [place] * (report.skipped <= NAMED_PLACES)
    report.kept = len(kept)
    if not kept:
        found = f"{report.name}: nothing is left without {report.skipped_rows}"
        raise UserError(f"data.dataset: {found}. Raise training.seq_len, or shorten the prompts.")
    return kept, report


def shared_examples(train: list[Example], val: list[Example]) -> int:
    """How many examples of `val` are in `train` too, token for token."""
    seen = {example.ids.tobytes() for example in train}
    return sum(example.ids.tobytes() in seen for example in val)


def shared_questions(train: list[Example], val: list[Example]) -> int:
    """How many examples of `val` ask what one of `train` asks, whatever the answers: all before the first target is equal."""
    seen = {_asked(example) for example in train}
    return sum(_asked(example) in seen for example in val)


def _asked(example: Example) -> bytes:
    return example.ids[: int(example.trained.argmax())].tobytes()


# How Anthropic's hh-rlhf writes its turns.
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def fingerprint_of_examples(examples: Sequence[Example]) -> str:
    """12 hex digits that identify the tokens and targets of examples in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(b"%d " % len(example.ids) + example.ids.tobytes() + example.trained.tobytes())
    return digest.hexdigest()[:12]
