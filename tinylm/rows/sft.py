"""Examples of supervised fine-tuning: one conversation each, as ids and a mask of what is trained.

    row         {"instruction": "2+2?", "output": "4"}                    row_files.read_rows
    turns       user "2+2?", assistant "4"                                columns.parse_conversation
    ids         ### Instruction: 2+2?⏎### Output: 4⏎<|sep|>                templates.Template.encode
    trained     ...................................^^^^^^^^               . seen only, ^ trained
    example     the first seq_len + 1 ids, or the last ones; the last id is only a target
                                                                          build_examples

All rows are in memory: fine-tuning data are small. tokens/example_rows.py packs examples into rows.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from tinylm.common.errors import UserError
from tinylm.config.schema import DataConfig
from tinylm.rows.columns import read_conversation
from tinylm.rows.conversation import Conversation
from tinylm.rows.row_files import LocatedRow, read_rows
from tinylm.rows.skipped_rows import RowReport, SkipReason
from tinylm.rows.templates import Template
from tinylm.text.sources import Which
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.example_rows import Example
from tinylm.tokens.overlap import count_overlap


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
    source: str = "",
) -> tuple[list[Example], RowReport]:
    """The examples of a split in the order of its rows,
    and the report of what was truncated and skipped.

    Args:
        data: where the rows are.
        which: training or validation.
        seed: decides which rows are held out.
        template: how conversations are written.
        tokenizer: encodes the texts.
        seq_len: inputs of a row of a batch; an example has at most seq_len + 1 ids.
        train_on: the responses, or all tokens but the first.
        to_conversation: turns a row into a conversation; None: `parse_conversation`.
        built_in: rows to use in place of those that `data` names.
        source: the dataset, for notes, if it is one of several.

    Raises:
        UserError: as `read_rows`; a row is not a conversation;
            or the prompt of every row fills the context.
    """
    lost = "their start" if data.truncation_side == "left" else "their end"
    report = RowReport(which, seq_len, source, lost=lost, max_bad=data.skip_bad_rows)
    examples: list[Example] = []
    for location, row in read_rows(data, which, seed, built_in):
        try:
            conversation = read_conversation(row, data, report, to_conversation)
            whole = template.encode(conversation, tokenizer)
            trained = whole.trained
            if train_on == "all":
                trained = _all_targets(conversation, template, tokenizer, whole)
        except UserError as error:
            report.skip_bad(location, error)
            continue
        example = Example(whole.ids, trained, location)
        if len(whole.ids) > seq_len + 1:
            example = _cut(example, seq_len, data.truncation_side)
        if not example.trained.any():
            reason = SkipReason.PROMPT_TOO_LONG if trained.any() else SkipReason.NOTHING_TRAINED
            report.skip(reason, location)
            continue
        examples.append(example)
        report.count_system(conversation)
        if data.tools is not None:
            report.count_calls(conversation)
        report.truncated += len(whole.ids) > len(example.ids)
    report.kept = len(examples)
    report.require_rows()
    return examples, report


def _cut(example: Example, seq_len: int, side: Literal["left", "right"]) -> Example:
    """The example without what is too long on this side. seq_len inputs need seq_len + 1 ids: the
    first is only an input, the last only a target.
    """
    if side == "right":
        kept = slice(seq_len + 1)
        return Example(example.ids[kept], example.trained[kept], example.location)
    kept = slice(-(seq_len + 1), None)
    trained = example.trained[kept].copy()
    trained[0] = False  # nothing is before it
    return Example(example.ids[kept], trained, example.location)


def _all_targets(
    conversation: Conversation, template: Template, tokenizer: Tokenizer, whole: Example
) -> np.ndarray:
    """Every token of a conversation but the first, and but the answers of weight 0."""
    targets = np.arange(len(whole.ids)) > 0
    if all(turn.trained for turn in conversation):
        return targets
    answers = template.encode(tuple(replace(t, trained=True) for t in conversation), tokenizer)
    return targets & ~(answers.trained & ~whole.trained)


def count_shared_examples(train: Iterable[Example], val: Iterable[Example]) -> int:
    """How many examples of `val` are also in `train`, token for token."""
    contents = ((example.ids.tobytes() for example in split) for split in (train, val))
    return count_overlap(*contents).repeated


def count_shared_prompts(train: Iterable[Example], val: Iterable[Example]) -> int:
    """How many examples of `val` have the prompt of one of `train`, whatever the answer."""
    contents = ((_prompt_ids(example).tobytes() for example in split) for split in (train, val))
    return count_overlap(*contents).repeated


def _prompt_ids(example: Example) -> np.ndarray:
    """The ids before the first target."""
    return example.ids[: int(example.trained.argmax())]


def fingerprint_of_examples(examples: Sequence[Example]) -> str:
    """12 hex digits that identify the tokens and targets of examples in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(b"%d " % len(example.ids) + example.ids.tobytes() + example.trained.tobytes())
    return digest.hexdigest()[:12]
