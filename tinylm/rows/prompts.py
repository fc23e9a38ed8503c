"""Prompts to be answered by a model, with the answer of their row: what reinforcement learning and
its rewards read.

    row      {"prompt": "2+2=", "completion": " 4"}            row_files.read_rows
    prompt   the ids before the last answer, and its texts     build_prompts

A prompt that leaves no room for an answer is skipped.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinylm.common.errors import UserError
from tinylm.config.schema import DataConfig
from tinylm.rows.columns import read_conversation
from tinylm.rows.conversation import Conversation
from tinylm.rows.row_files import LocatedRow, read_rows
from tinylm.rows.skipped_rows import RowReport, SkipReason
from tinylm.rows.templates import Template, require_answer
from tinylm.text.sources import Which
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.overlap import count_overlap


class PromptRow(NamedTuple):
    """The prompt of a row."""

    ids: np.ndarray
    """(n,) int64, in the template, up to where the answer begins"""
    question: str
    """the text of the last user turn"""
    target: str
    """the answer of the row"""
    location: str
    """its file and line"""


def build_prompts(
    data: DataConfig,
    which: Which,
    seed: int,
    template: Template,
    tokenizer: Tokenizer,
    max_len: int,
    *,
    to_conversation: Callable[[dict[str, Any]], Conversation] | None = None,
    built_in: Sequence[LocatedRow] = (),
) -> tuple[list[PromptRow], RowReport]:
    """The prompts of a split in the order of its rows, and the report of what was skipped.

    Args:
        data: where the rows are.
        which: training or validation.
        seed: decides which rows are held out.
        template: how conversations are written.
        tokenizer: encodes the texts.
        max_len: tokens of a prompt; a longer one is skipped.
        to_conversation: turns a row into a conversation; None: `parse_conversation`.
        built_in: rows to use in place of those that `data` names.

    Raises:
        UserError: as `read_rows`; a row is not a conversation that ends with an answer; or no
            prompt is left.
    """
    report = RowReport(which, max_len, max_bad=data.skip_bad_rows)
    prompts: list[PromptRow] = []
    for location, row in read_rows(data, which, seed, built_in):
        try:
            conversation = read_conversation(row, data, report, to_conversation)
            require_answer(conversation)
            *before, answer = conversation
            ids = template.prompt_ids(tuple(before), tokenizer)
        except UserError as error:
            report.skip_bad(location, error)
            continue
        if len(ids) > max_len:
            report.skip(SkipReason.NO_ROOM_FOR_ANSWER, location)
            continue
        ids_array = np.array(ids, dtype=np.int64)
        prompts.append(PromptRow(ids_array, before[-1].full_text, answer.text, location))
        report.count_system(conversation)
    report.kept = len(prompts)
    report.require_rows()
    return prompts, report


def count_shared(train: Iterable[PromptRow], val: Iterable[PromptRow]) -> int:
    """How many prompts of `val` are also in `train`, token for token."""
    contents = ((prompt.ids.tobytes() for prompt in split) for split in (train, val))
    return count_overlap(*contents).repeated


def fingerprint_of_prompts(prompts: Sequence[PromptRow]) -> str:
    """12 hex digits that identify prompts and targets in their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        target = prompt.target.encode("utf-8", errors="surrogatepass")
        digest.update(b"%d %d " % (len(prompt.ids), len(target)) + prompt.ids.tobytes() + target)
    return digest.hexdigest()[:12]
