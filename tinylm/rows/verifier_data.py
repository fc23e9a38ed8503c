"""Training data of a verifier: problems, each with right and wrong answers.

    row ─▶ Problem: question, right answer, sampled answers               `read_problems`, `filter_problems`
        ─▶ answers, right or wrong; some wrong ones by changing a number  `graded_answers`
        ─▶ VerifierExample: ids, right or wrong, where the error is       `build_verifier_examples`
        ─▶ batch                                                          `collate_pairs`

    ids         Q  Q  Q  <eos>  4  8  /  2  =  2  5  a problem, a separator, an answer
    error_mask  .  .  .  .      .  .  .  .  .  .  ^  where a wrong answer differs from the right one

How a model is asked for answers is in eval/sampled_answers.py,
how a verifier scores them in eval/verifier_scoring.py.

# B pairs · T tokens
"""

import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from tinylm.common.errors import UserError
from tinylm.config.schema import DataConfig
from tinylm.rows.columns import CORRECT, Columns, is_sms, parse_conversation, unread_columns
from tinylm.rows.conversation import Conversation, Turn
from tinylm.rows.numbers import NUMBER, corrupt_number, same_number
from tinylm.rows.row_files import LocatedRow, read_rows
from tinylm.rows.skipped_rows import RowReport, SkipReason
from tinylm.text.row_text import kind_of
from tinylm.text.sources import Which
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.packing import Batch

# GSM8K's calculator annotations: 48/2 = <<48/2=24>>24. With every result twice,
# a verifier would only compare the two.
ANNOTATION = re.compile(r"<<[^<>\n]*=[^<>\n]*>>")
# Batches are padded to a multiple of this, so that there are fewer shapes to compile for.
LENGTH_MULTIPLE = 32


class GradedAnswer(NamedTuple):
    """An answer, and whether it is right."""

    text: str
    right: bool


@dataclass(frozen=True)
class Problem:
    """A problem with the answer of its row, and the answers sampled from a model."""

    location: str
    question: Turn
    answer: str
    """right, unless `label` is False"""
    samples: tuple[GradedAnswer, ...] = ()
    label: bool | None = None
    """whether the row says that `answer` is right; None: it has no label"""
    reference: str | None = None
    """for a wrong answer: the right one of another row with the same question, if there is one"""

    @property
    def is_right(self) -> bool:
        """Whether `answer` is right."""
        return self.label is not False


# --- rows to problems ---


def read_problems(
    data: DataConfig,
    which: Which,
    seed: int,
    *,
    to_conversation: Callable[[dict[str, Any]], Conversation] | None = None,
    built_in: Sequence[LocatedRow] = (),
    report: RowReport | None = None,
) -> list[Problem]:
    """The problems of a split, one per row; a row with `label` 0 has a wrong answer.

    Args:
        data: where the rows are.
        which: training or validation.
        seed: decides which rows are held out.
        to_conversation: turns a row into a conversation; None: by its keys,
            or data.rows (`parse_conversation`).
        built_in: rows to use in place of those that `data` names.
        report: gets the rows with a mistake and the columns that are not read.

    Raises:
        UserError: as `read_rows`; or a row is not a question with an answer.
    """
    report = report or RowReport(which, 0, max_bad=data.skip_bad_rows)
    problems = []
    for location, row in read_rows(data, which, seed, built_in):
        try:
            if to_conversation is None:
                problem = parse_problem(location, parse_conversation(row, data))
                problem = replace(problem, label=parse_label(row, data))
                report.unread_columns |= dict.fromkeys(unread_columns(row, data, "label"))
            else:
                problem = parse_problem(location, to_conversation(row))
        except UserError as error:
            report.skip_bad(location, error)
            continue
        problems.append(problem)
    return _with_references(problems)


def parse_label(row: dict[str, Any], data: DataConfig) -> bool | None:
    """Whether a row says that its answer is right; None if it has no label.

    >>> row = {"prompt": "2+2?", "completion": "5", "label": 0}
    >>> parse_label(row, DataConfig()), parse_label(row | {"label": None}, DataConfig())
    (False, None)
    """
    columns = Columns(row, data.columns or {})
    if columns.find("label") is None and "label" not in columns.names:
        return None
    name, value = columns.value("label")
    if value is None or is_sms(row, data):
        return None
    if not isinstance(value, int | float) or value not in (0, 1):
        got = value if isinstance(value, int | float | str) else kind_of(value)
        problem = f"must be 1 or true (a right answer), or 0 or false (a wrong one), got {got}"
        raise UserError(name, problem, CORRECT)
    return bool(value)


def _with_references(problems: list[Problem]) -> list[Problem]:
    """The problems; those with a wrong answer get the first right one to the same question."""
    if all(problem.is_right for problem in problems):
        return problems
    right: dict[Turn, str] = {}
    for problem in problems:
        if problem.is_right:
            right.setdefault(problem.question, problem.answer)
    return [
        problem if problem.is_right else replace(problem, reference=right.get(problem.question))
        for problem in problems
    ]


def parse_problem(location: str, conversation: Conversation) -> Problem:
    """The last answer of a conversation, and everything before it as the problem."""
    *before, answer = conversation
    if answer.role != "assistant" or not before:
        raise UserError(
            "last turn",
            "must be an assistant turn that answers a question",
            "Add the answer, or remove the row",
        )
    if not answer.trained:
        raise UserError("last turn", "its weight must be 1 for a verifier, got 0", CORRECT)
    question = before[0]
    if len(before) > 1:
        question = Turn("user", "\n\n".join(turn.full_text for turn in before))
    return Problem(location, question, remove_annotations(answer.text))


def remove_annotations(text: str) -> str:
    """A text without GSM8K's calculator annotations.

    >>> remove_annotations("She has 15-7=<<15-7=8>>8 stamps left.")
    'She has 15-7=8 stamps left.'
    """
    return ANNOTATION.sub("", text)


def without_validation_problems(
    train: Sequence[Problem], val: Sequence[Problem], report: RowReport
) -> list[Problem]:
    """The training problems that are not in validation; the report counts the others."""
    val_questions = {problem.question for problem in val}
    kept = []
    for problem in train:
        if problem.question in val_questions:
            report.skip(SkipReason.IN_VALIDATION, problem.location)
        else:
            kept.append(problem)
    return kept


def filter_problems(
    problems: Sequence[Problem], report: RowReport, tokenizer: Tokenizer, *, n_wrong: int
) -> list[Problem]:
    """The problems that fit the context of `report.seq_len` tokens and have wrong answers;
    others are reported.

    Raises:
        UserError: no problem is left.
    """
    # Besides the answer, a row needs the separator and at least one token of the problem.
    max_answer = report.seq_len - 2
    kept = []
    for problem in problems:
        n_answer = len(tokenizer.encode(problem.answer))
        if n_answer > max_answer:
            report.skip(SkipReason.ANSWER_TOO_LONG, problem.location)
            continue
        if n_wrong and problem.label is None and NUMBER.search(problem.answer) is None:
            report.skip(SkipReason.NO_NUMBER, problem.location)
            continue
        fitting = [
            sample for sample in problem.samples if len(tokenizer.encode(sample.text)) <= max_answer
        ]
        kept.append(replace(problem, samples=tuple(fitting)))
        n_question = len(tokenizer.encode(problem.question.full_text))
        report.truncated += n_question + 1 + n_answer > report.seq_len
    report.kept = len(kept)
    report.require_rows()
    return kept


# --- answers ---


def grade_samples(problem: Problem, texts: Sequence[str]) -> tuple[GradedAnswer, ...]:
    """A model's answers without repetitions: right if the last number is
    that of the right answer.
    """
    different = dict.fromkeys(remove_annotations(text).strip() for text in texts)
    graded = []
    for text in different:
        if text and text != problem.answer.strip():
            graded.append(GradedAnswer(text, same_number(text, problem.answer)))
    return tuple(graded)


def graded_answers(problem: Problem, *, n_wrong: int, seed: str) -> list[GradedAnswer]:
    """The answer of the row and the sampled answers; without a label, also `n_wrong` copies of the
    answer with one number changed (a function of the seed).
    """
    if problem.label is not None:
        return [GradedAnswer(problem.answer, problem.label), *problem.samples]
    rng = random.Random(seed)  # noqa: S311  (no secret)
    wrong = [corrupt_number(problem.answer, rng) for _ in range(n_wrong)]
    return [
        GradedAnswer(problem.answer, True),
        *(GradedAnswer(text, False) for text in wrong if text is not None),
        *problem.samples,
    ]


# --- answers to tokens ---


class VerifierExample(NamedTuple):
    """A problem with one answer as tokens."""

    ids: list[int]
    right: bool
    error_positions: tuple[int, ...]
    """where a wrong answer differs from the right one, all of it if none is known;
    () for a right answer"""


def build_verifier_examples(
    problem: Problem, tokenizer: Tokenizer, seq_len: int, *, n_wrong: int, seed: str
) -> list[VerifierExample]:
    """One example for each answer to a problem."""
    question_ids = tokenizer.encode(problem.question.full_text)
    answers = graded_answers(problem, n_wrong=n_wrong, seed=seed)
    right = problem.answer if problem.is_right else problem.reference
    right_ids = None if right is None else tokenizer.encode(right)
    examples = []
    for answer in answers:
        answer_ids = tokenizer.encode(answer.text)
        ids = pair_ids(question_ids, answer_ids, tokenizer, seq_len)
        positions: tuple[int, ...] = ()
        if not answer.right:
            # Positions in the answer to positions in the row. If the answer is cut on its left,
            # those cut off become 0.
            start = len(ids) - len(answer_ids)
            span = range(len(answer_ids))  # somewhere in it, if no right answer is known
            if right_ids is not None:
                span = error_span(answer_ids, right_ids)
            positions = tuple(max(start + i, 0) for i in span)
        examples.append(VerifierExample(ids, answer.right, positions))
    return examples


def pair_ids(
    question: Sequence[int], answer: Sequence[int], tokenizer: Tokenizer, seq_len: int
) -> list[int]:
    """Problem, separator (EOS), answer; if that is longer than `seq_len` tokens, the last ones."""
    return [*question, tokenizer.eos_id, *answer][-seq_len:]


def error_span(answer: Sequence[int], right: Sequence[int]) -> range:
    """The positions of `answer` between the beginning and the end that it shares
    with the right answer; at least one.

    >>> error_span([1, 2, 9, 9, 4], [1, 2, 3, 4]), error_span([1, 2], [1, 7, 2])
    (range(2, 4), range(1, 2))
    """
    shorter = min(len(answer), len(right))
    start = next((i for i in range(shorter) if answer[i] != right[i]), shorter)
    n_rest = shorter - start
    n_end = next((i for i in range(n_rest) if answer[-1 - i] != right[-1 - i]), n_rest)
    start = min(start, len(answer) - 1)
    return range(start, max(len(answer) - n_end, start + 1))


# --- tokens to batches ---


def pad_pairs(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Any]:
    """`input_ids` (B, T) int64 and `attention_mask` (B, T) bool of rows of ids, padded on the
    right to the longest.
    """
    longest = max((len(row) for row in rows), default=0)
    padded_length = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    input_ids = torch.full((len(rows), padded_length), pad_id, dtype=torch.long)
    for number, row in enumerate(rows):
        input_ids[number, : len(row)] = torch.tensor(row)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    attention_mask = torch.arange(padded_length) < lengths[:, None]  # (B, T)
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def collate_pairs(examples: Sequence[VerifierExample], pad_id: int) -> dict[str, Any]:
    """`pad_pairs` with `label` (B,) int64, 1 for right, and `error_mask` (B, T) bool."""
    batch = pad_pairs([example.ids for example in examples], pad_id)
    error_mask = torch.zeros_like(batch["attention_mask"])
    for number, example in enumerate(examples):
        error_mask[number, list(example.error_positions)] = True
    label = torch.tensor([int(example.right) for example in examples], dtype=torch.long)
    return batch | {"label": label, "error_mask": error_mask}


def collate_problems(
    rows: Sequence[Problem | None],
    places: Sequence[int],
    *,
    tokenizer: Tokenizer,
    seq_len: int,
    n_wrong: int,
    seed: str,
) -> Batch:
    """`collate_pairs` of every answer to every problem; no pairs where there is only padding.

    Args:
        rows: the problems.
        places: their places in the run, which also decide the wrong answers:
            each pass has other ones.
        tokenizer: encodes problems and answers.
        seq_len: tokens of the longest pair.
        n_wrong: wrong answers of each problem.
        seed: the rest of what the wrong answers depend on.
    """
    pairs = []
    origin = []
    for problem, place in zip(rows, places, strict=True):
        if problem is None:
            continue
        origin.append(problem.location)
        pairs += build_verifier_examples(
            problem, tokenizer, seq_len, n_wrong=n_wrong, seed=f"{seed} {place}"
        )
    return collate_pairs(pairs, tokenizer.pad_id) | {"origin": origin}


def fingerprint_of_problems(problems: Sequence[Problem]) -> str:
    """12 hex digits that identify problems and their answers, in their order."""
    plain = []
    for problem in problems:
        contents: list[Any] = [problem.question.full_text, problem.answer, problem.samples]
        plain.append(contents if problem.label is None else [*contents, problem.label])
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:12]
