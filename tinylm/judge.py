"""Problems with right and wrong answers: what a verifier learns from, and a verifier at work.

    row ─▶ Problem (its text, the right answer, what a model answered)                         `problems`
    Problem ─▶ answers with the word right or wrong; wrong ones by changing a number             `answers_of`
    problem and answer ─▶ ids: the end of the problem, a separator, the answer                    `pair_ids`
    pairs ─▶ a batch ─▶ probabilities of being right                                       `pair_batch`, `Judge`

The encoder itself, and how one number is changed, is verifier.py's business; how a model is asked is evaluate.py's.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tinylm.checkpoint import load_verifier
from tinylm.config import DataConfig
from tinylm.corpus import Which
from tinylm.errors import UserError
from tinylm.metrics import same_number
from tinylm.prompts import Conversation, Turn
from tinylm.rows import NAMED_PLACES, Record, built_in_split, conversation_of, records
from tinylm.tasks import NAMED
from tinylm.tokenizer import Tokenizer
from tinylm.verifier import NUMBER, Verifier, corrupted

# GSM8K's notes to a calculator: 48/2 = <<48/2=24>>24. They say each result twice, and a verifier would only compare the two.
ANNOTATION = re.compile(r"<<[^<>\n]*=[^<>\n]*>>")
# Padding is masked, so that any id does; a batch is padded to a multiple of this, so that fewer shapes are met.
LENGTH_STEP = 32


class Judged(NamedTuple):
    """An answer, and whether it is right."""

    text: str
    right: bool


@dataclass(frozen=True)
class Problem:
    """A problem with its right answer, and what a model answered."""

    place: str
    question: Turn
    answer: str
    samples: tuple[Judged, ...] = ()


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
        notes = [f"{name}: {self.cut} of {self.kept} problems lost their beginning to rows of {self.seq_len} tokens"] if self.cut else []
        reasons = ((self.too_long, f"whose answers fill a row of {self.seq_len} tokens"), (self.numberless, "without a number to change in the answer"))
        return notes + [f"{name}: skipped {len(places)} rows {why} ({_some(places)})" for places, why in reasons if places]


def _some(places: Sequence[str]) -> str:
    return ", ".join(places[:NAMED_PLACES]) + (", ..." if len(places) > NAMED_PLACES else "")


def without_annotations(text: str) -> str:
    """A text without GSM8K's notes to a calculator.

    >>> without_annotations("She has 15-7=<<15-7=8>>8 stamps left.")
    'She has 15-7=8 stamps left.'
    """
    return ANNOTATION.sub("", text)


# --- problems ---------------------------------------------------------------------------------------------------------


def problems(data: DataConfig, which: Which, seed: int, built_in: Sequence[Record] = ()) -> list[Problem]:
    """The problems of a split, one a row, of the rows that `data` names, or of built-in ones in their place.

    Raises:
        UserError: as `records`; or a row does not ask one thing and answer it.
    """
    to_conversation = NAMED[data.task].conversation if data.task else lambda row: conversation_of(row, data)
    found = []
    for place, row in built_in_split(built_in, which) if built_in else records(data, which, seed):
        try:
            found.append(problem_of(place, to_conversation(row)))
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    return found


def problem_of(place: str, conversation: Conversation) -> Problem:
    """The last answer of a conversation, and all that was said before it."""
    *before, answer = conversation
    if answer.role != "assistant" or not before:
        raise UserError("the last turn is not the assistant's answer to a question. Add the answer, or take the row out.")
    question = before[0] if len(before) == 1 else Turn("user", "\n\n".join(turn.whole for turn in before))
    return Problem(place, question, without_annotations(answer.text))


def usable(found: Sequence[Problem], which: Which, tokenizer: Tokenizer, seq_len: int, *, n_wrong: int) -> tuple[list[Problem], ProblemReport]:
    """The problems that fit into rows of `seq_len` tokens and have wrong answers, and what became of the others.

    Raises:
        UserError: none is left.
    """
    report, kept = ProblemReport(which, seq_len), []
    for problem in found:
        sizes = [len(tokenizer.encode(text)) for text in (problem.answer, *(sample.text for sample in problem.samples))]
        fits = [size < seq_len - 1 for size in sizes]  # beside the separator one token of the problem
        if not fits[0]:
            report.too_long.append(problem.place)
        elif n_wrong and NUMBER.search(problem.answer) is None:
            report.numberless.append(problem.place)
        else:
            kept.append(replace(problem, samples=tuple(sample for sample, fit in zip(problem.samples, fits[1:], strict=True) if fit)))
            report.cut += len(tokenizer.encode(problem.question.whole)) + 1 + sizes[0] > seq_len
    report.kept = len(kept)
    if not kept:
        raise UserError(f"data.dataset: no problem is left: {'; '.join(report.notes())}. Raise training.seq_len, or give other rows.")
    return kept, report


def judged(problem: Problem, texts: Sequence[str]) -> tuple[Judged, ...]:
    """What a model answered, without repetitions: right where its last number is that of the right answer."""
    different = dict.fromkeys(without_annotations(text).strip() for text in texts)
    return tuple(Judged(text, same_number(text, problem.answer)) for text in different if text and text != problem.answer.strip())


def answers_of(problem: Problem, *, n_wrong: int, seed: str) -> list[Judged]:
    """The right answer, `n_wrong` made of it by changing a number, which depend on the seed alone, and what a model answered."""
    draw = random.Random(seed)  # noqa: S311  (no secret)
    wrong = [corrupted(problem.answer, draw) for _ in range(n_wrong)]
    return [Judged(problem.answer, True), *(Judged(text, False) for text in wrong if text is not None), *problem.samples]


# --- pairs ------------------------------------------------------------------------------------------------------------


def pair_ids(problem: str, answer: str, tokenizer: Tokenizer, seq_len: int) -> list[int]:
    """Problem, separator (EOS), answer; of what is longer than `seq_len` tokens the last ones."""
    return [*tokenizer.encode(problem), tokenizer.eos_id, *tokenizer.encode(answer)][-seq_len:]


def pair_batch(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Any]:
    """`input_ids` (B, T) int64 and `attention_mask` (B, T) bool of rows of ids, padded on the right to the longest of them."""
    longest = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), -(-longest // LENGTH_STEP) * LENGTH_STEP), pad_id, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.arange(ids.size(1)) < lengths[:, None]}


@dataclass(frozen=True)
class Judge:
    """A verifier at work."""

    model: Verifier
    """in evaluation mode"""
    tokenizer: Tokenizer
    seq_len: int
    """tokens of a pair that it was trained on"""

    @classmethod
    def load(cls, path: Path, device: str) -> "Judge":
        """The verifier of a checkpoint; raises as `load_verifier`."""
        loaded = load_verifier(path, device)
        return cls(loaded.model, loaded.tokenizer, loaded.config.training.seq_len)

    @torch.inference_mode()
    def probabilities(self, problem: str, answers: Sequence[str]) -> list[float]:
        """How likely each of at least one answer is right."""
        device = self.model.score.weight.device
        rows = [pair_ids(problem, without_annotations(answer).strip(), self.tokenizer, self.seq_len) for answer in answers]
        batch = pair_batch(rows, self.tokenizer.pad_id)
        return torch.sigmoid(self.model(batch["input_ids"].to(device), batch["attention_mask"].to(device))).tolist()
