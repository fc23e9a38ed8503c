"""Problems with right and wrong answers: what a verifier learns from.

    row ─▶ Problem (its text, the right answer, what a model answered)                         `read_problems`
    Problem ─▶ answers with the word right or wrong; wrong ones by changing a number             `graded_answers`
    problem and answer ─▶ ids: the end of the problem, a separator, the answer                    `pair_ids`, `build_verifier_examples`

What becomes of the pairs is judge.py's business; how a model is asked is evaluate.py's.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from tinylm.common.errors import UserError
from tinylm.config.schema import DataConfig
from tinylm.rows.columns import parse_conversation
from tinylm.rows.conversation import Conversation, Turn
from tinylm.rows.numbers import NUMBER, corrupt_number, same_number
from tinylm.rows.row_files import NAMED_PLACES, LocatedRow, read_rows, split_built_in_rows
from tinylm.text.splits import Which
from tinylm.tokenizer.base import Tokenizer

# GSM8K's notes to a calculator: 48/2 = <<48/2=24>>24. They say each result twice, and a verifier would only compare the two.
ANNOTATION = re.compile(r"<<[^<>\n]*=[^<>\n]*>>")


class GradedAnswer(NamedTuple):
    """An answer, and whether it is right."""

    text: str
    right: bool


@dataclass(frozen=True)
class Problem:
    """A problem with its right answer, and what a model answered."""

    place: str
    question: Turn
    answer: str
    samples: tuple[GradedAnswer, ...] = ()


@dataclass
class ProblemReport:
    """What became of the rows of a split."""

    which: Which
    seq_len: int
    kept: int = 0
    cut: int = 0
    """of those kept, how many problems lost their beginning"""
    too_long: list[str] = field(default_factory=list)
    """where rows stand whose answers leave no room for the problem"""
    numberless: list[str] = field(default_factory=list)
    """where rows stand whose answers have no number to change"""

    def notes(self) -> list[str]:
        """What a user should know of it, a line each."""
        name = "validation" if self.which == "val" else "training"
        notes = (
            [
                f"{name}: {self.cut} of {self.kept} problems lost their beginning to rows of {self.seq_len} tokens"
            ]
            if self.cut
            else []
        )
        reasons = (
            (self.too_long, f"whose answers fill a row of {self.seq_len} tokens"),
            (self.numberless, "without a number to change in the answer"),
        )
        return notes + [
            f"{name}: skipped {len(places)} rows {why} ({_some(places)})"
            for places, why in reasons
            if places
        ]


def _some(places: Sequence[str]) -> str:
    return ", ".join(places[:NAMED_PLACES]) + (", ..." if len(places) > NAMED_PLACES else "")


def remove_annotations(text: str) -> str:
    """A text without GSM8K's notes to a calculator.

    >>> without_annotations("She has 15-7=<<15-7=8>>8 stamps left.")
    'She has 15-7=8 stamps left.'
    """
    return ANNOTATION.sub("", text)


# --- problems ---


def read_problems(
    data: DataConfig,
    which: Which,
    seed: int,
    *,
    to_conversation: Callable[[dict[str, Any]], Conversation] | None = None,
    built_in: Sequence[LocatedRow] = (),
) -> list[Problem]:
    """The problems of a split, one a row.

    Args:
        data: where the rows are.
        which: training or validation.
        seed: decides which rows are held out.
        to_conversation: turns a row into a conversation; None: by its keys, or data.rows (`parse_conversation`).
        built_in: rows to use in place of those that `data` names.

    Raises:
        UserError: as `read_rows`; or a row does not ask one thing and answer it.
    """
    to_conversation = to_conversation or (lambda row: parse_conversation(row, data))
    found = []
    for place, row in (
        split_built_in_rows(built_in, which) if built_in else read_rows(data, which, seed)
    ):
        try:
            found.append(parse_problem(place, to_conversation(row)))
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    return found


def parse_problem(place: str, conversation: Conversation) -> Problem:
    """The last answer of a conversation, and all that was said before it."""
    *before, answer = conversation
    if answer.role != "assistant" or not before:
        raise UserError(
            "the last turn is not the assistant's answer to a question. Add the answer, or take the row out."
        )
    question = (
        before[0]
        if len(before) == 1
        else Turn("user", "\n\n".join(turn.full_text for turn in before))
    )
    return Problem(place, question, remove_annotations(answer.text))


def filter_problems(
    found: Sequence[Problem], which: Which, tokenizer: Tokenizer, seq_len: int, *, n_wrong: int
) -> tuple[list[Problem], ProblemReport]:
    """The problems that fit into rows of `seq_len` tokens and have wrong answers, and what became of the others.

    Raises:
        UserError: none is left, or there was none: those of training that are validation problems too were taken out before.
    """
    if not found:
        raise UserError(
            "data.dataset: every problem for training is a validation problem too. Give other rows to one of the two."
        )
    report, kept = ProblemReport(which, seq_len), []
    for problem in found:
        sizes = [
            len(tokenizer.encode(text))
            for text in (problem.answer, *(sample.text for sample in problem.samples))
        ]
        fits = [
            size < seq_len - 1 for size in sizes
        ]  # beside the separator one token of the problem
        if not fits[0]:
            report.too_long.append(problem.place)
        elif n_wrong and NUMBER.search(problem.answer) is None:
            report.numberless.append(problem.place)
        else:
            kept.append(
                replace(
                    problem,
                    samples=tuple(
                        sample for sample, fit in zip(problem.samples, fits[1:], strict=True) if fit
                    ),
                )
            )
            report.cut += len(tokenizer.encode(problem.question.full_text)) + 1 + sizes[0] > seq_len
    report.kept = len(kept)
    if not kept:
        raise UserError(
            f"data.dataset: no problem is left: {'; '.join(report.notes())}. Raise training.seq_len, or give other rows."
        )
    return kept, report


def grade_samples(problem: Problem, texts: Sequence[str]) -> tuple[GradedAnswer, ...]:
    """What a model answered, without repetitions: right where its last number is that of the right answer."""
    different = dict.fromkeys(remove_annotations(text).strip() for text in texts)
    return tuple(
        GradedAnswer(text, same_number(text, problem.answer))
        for text in different
        if text and text != problem.answer.strip()
    )


def graded_answers(problem: Problem, *, n_wrong: int, seed: str) -> list[GradedAnswer]:
    """The right answer, `n_wrong` made of it by changing a number, which depend on the seed alone, and what a model answered."""
    draw = random.Random(seed)  # noqa: S311  (no secret)
    wrong = [corrupt_number(problem.answer, draw) for _ in range(n_wrong)]
    return [
        GradedAnswer(problem.answer, True),
        *(GradedAnswer(text, False) for text in wrong if text is not None),
        *problem.samples,
    ]


# --- pairs ---


class VerifierExample(NamedTuple):
    """A problem with an answer as tokens."""

    ids: list[int]
    right: bool
    error_positions: tuple[int, ...]
    """places in which a wrong answer departs from the right one"""


def pair_ids(
    problem: Sequence[int], answer: Sequence[int], tokenizer: Tokenizer, seq_len: int
) -> list[int]:
    """Problem, separator (EOS), answer; of what is longer than `seq_len` tokens the last ones."""
    return [*problem, tokenizer.eos_id, *answer][-seq_len:]


def error_span(answer: Sequence[int], right: Sequence[int]) -> range:
    """The places of `answer` between what it has in common with the right answer at its beginning and at its end, at least one.

    >>> departure([1, 2, 9, 9, 4], [1, 2, 3, 4]), departure([1, 2], [1, 7, 2])
    (range(2, 4), range(1, 2))
    """
    shorter = min(len(answer), len(right))
    start = next((i for i in range(shorter) if answer[i] != right[i]), shorter)
    common = next(
        (i for i in range(shorter - start) if answer[-1 - i] != right[-1 - i]), shorter - start
    )
    start = min(start, len(answer) - 1)
    return range(start, max(len(answer) - common, start + 1))


def build_verifier_examples(
    problem: Problem, tokenizer: Tokenizer, seq_len: int, *, n_wrong: int, seed: str
) -> list[VerifierExample]:
    """All answers of a problem as pairs."""
    asked, answers = (
        tokenizer.encode(problem.question.full_text),
        graded_answers(problem, n_wrong=n_wrong, seed=seed),
    )
    encoded = [tokenizer.encode(answer.text) for answer in answers]
    rows = [pair_ids(asked, ids, tokenizer, seq_len) for ids in encoded]
    # Of an answer that is cut on its left the places move with it; what of them is cut off is at the first place.
    spans = [
        [max(len(row) - len(ids) + place, 0) for place in error_span(ids, encoded[0])]
        for row, ids in zip(rows, encoded, strict=True)
    ]
    return [
        VerifierExample(row, answer.right, () if answer.right else tuple(span))
        for row, answer, span in zip(rows, answers, spans, strict=True)
    ]


# Padding is masked, so that any id does; a batch is padded to a multiple of this, so that fewer shapes are met.
LENGTH_STEP = 32


def pad_pairs(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Any]:
    """`input_ids` (B, T) int64 and `attention_mask` (B, T) bool of rows of ids, padded on the right to the longest of them."""
    longest = max((len(row) for row in rows), default=0)
    ids = torch.full(
        (len(rows), -(-longest // LENGTH_STEP) * LENGTH_STEP), pad_id, dtype=torch.long
    )
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.arange(ids.size(1)) < lengths[:, None]}


def collate_pairs(pairs: Sequence[VerifierExample], pad_id: int) -> dict[str, Any]:
    """`pad_pairs` with `label` (B,) int64, 1 for right, and `error_mask` (B, T) bool."""
    batch = pad_pairs([pair.ids for pair in pairs], pad_id)
    error_mask = torch.zeros_like(batch["attention_mask"])
    for number, pair in enumerate(pairs):
        error_mask[number, list(pair.error_positions)] = True
    return batch | {
        "label": torch.tensor([int(pair.right) for pair in pairs], dtype=torch.long),
        "error_mask": error_mask,
    }
