"""What a task is: rows with known columns become prompts and targets, and answers become scores.

    row ─▶ Example (question, target) ─▶ the model's answer ─▶ grade ─▶ Measure of all answers, beside what chance gives

Each file beside this one is one task. Knows nothing of models: evaluate.py asks them, finetune.py trains on `conversation`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinylm.common.errors import UserError, printable
from tinylm.common.statistics import Measure, mean
from tinylm.eval.metrics import exact_match, macro_f1
from tinylm.rows.conversation import Conversation, Turn
from tinylm.text.documents import kind_of, some_of

Row = Mapping[str, Any]
# What stands between the examples of a few-shot prompt.
SHOT_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Hub:
    """Where a task's rows are on the Hugging Face hub."""

    dataset: str
    config: str | None
    train: str
    """split to train on and to draw examples from"""
    test: str
    """split with known targets to evaluate on"""


@dataclass(frozen=True)
class TaskExample:
    """One row as a model meets it."""

    place: str
    """where the row stands, for messages"""
    question: Turn
    """what a user would say"""
    target: str


def accuracy(output: str, target: str) -> dict[str, float]:
    """Whether the label is right."""
    return {"accuracy": float(exact_match(output, target))}


@dataclass(frozen=True)
class Task:
    """A task: where its rows are, how one is asked, and how an answer is graded."""

    name: str
    hub: Hub | None
    question: Callable[[Row], Turn]
    target: Callable[[Row], str]
    smoke: tuple[Row, ...]
    """rows written for this project, to try the task without any data"""
    grade: Callable[[str, str], dict[str, float]] = accuracy
    """what an output is worth beside its target, 0 to 1 by each measure; the first ranks, and makes an answer right where it is 1"""
    labels: tuple[str, ...] = ()
    """the only possible answers: the most probable one is taken; none: the model writes its answer"""
    frame: tuple[str, str] = ("", "")
    """what stands around a question where no template does"""
    joint: str = " "
    """between question and target where no template parts them"""
    stop: tuple[str, ...] = ()
    """what ends an answer where no template does: the beginning of the next question"""
    max_new_tokens: int = 256

    def conversation(self, row: Row) -> Conversation:
        """Question and answer of a row: what fine-tuning learns from.

        Raises:
            UserError: naming the column that is missing, or holds nothing to ask or answer.
        """
        question, target = self.question(row), self.target(row)
        if not target.strip():
            raise UserError("the answer is blank. Correct the row, or take it out.")
        return question, Turn("assistant", target)

    def example(self, place: str, row: Row) -> TaskExample:
        """The row as a model meets it; raises as `conversation` does, naming the place too."""
        try:
            question, answer = self.conversation(row)
        except UserError as problem:
            raise UserError(f"{place}: {problem}") from None
        return TaskExample(place, question, answer.text)

    def text(self, example: TaskExample, shots: Sequence[TaskExample] = ()) -> str:
        """The prompt of an example after solved ones, for a model without a template."""
        before, after = self.frame
        solved = [
            f"{before}{shot.question.full_text}{after}{self.joint}{shot.target}" for shot in shots
        ]
        return SHOT_SEPARATOR.join([*solved, f"{before}{example.question.full_text}{after}"])

    def score(
        self, outputs: Sequence[str], targets: Sequence[str], *, seed: int = 0
    ) -> dict[str, Measure]:
        """What at least one answer is worth by each measure; the seed is that of the intervals."""
        grades = [
            self.grade(output, target) for output, target in zip(outputs, targets, strict=True)
        ]
        measures = {name: mean([grade[name] for grade in grades], seed=seed) for name in grades[0]}
        return measures | (
            {"macro_f1": macro_f1(outputs, targets, seed=seed)} if self.labels else {}
        )

    def chance(self, targets: Sequence[str]) -> dict[str, float]:
        """The scores of answers that do not look at their prompt: the most frequent label, or else the target of another example.

        Empty for a single target to write, which has no other.
        """
        if not self.labels and len(targets) < 2:
            return {}
        blind = Counter(targets).most_common(1)[0][0]
        answers = [blind] * len(targets) if self.labels else [*targets[1:], targets[0]]
        return {name: measure.value for name, measure in self.score(answers, targets).items()}


# --- columns ---


def text_of(row: Row, column: str) -> str:
    """The text in a column."""
    value = value_of(row, column)
    if not isinstance(value, str):
        raise UserError(
            f"{column}: expected a string, found {kind_of(value)}. Correct the row, or take it out."
        )
    return value


def value_of(row: Row, column: str) -> Any:
    """What is in a column."""
    if column not in row:
        raise UserError(
            f"{column}: missing; the row has {some_of(row)}. Correct the row, or give the data of this task."
        )
    return row[column]


def label_of(row: Row, column: str, labels: Sequence[str]) -> str:
    """The label in a column, which has its name or its number.

    >>> label_of({"label": 1}, "label", ("ham", "spam")), label_of({"label": "ham"}, "label", ("ham", "spam"))
    ('spam', 'ham')
    """
    value = value_of(row, column)
    by_number = {
        form: label for number, label in enumerate(labels) for form in (number, str(number))
    }
    if isinstance(value, int | str) and not isinstance(value, bool):
        label = by_number.get(value, value)
        if label in labels:
            return str(label)
    choices = ", ".join(f"{number} ({label})" for number, label in enumerate(labels))
    raise UserError(
        f"{column}: expected {choices}, found {printable(repr(value))[:60]}. Correct the row, or take another split."
    )


# --- examples ---


def draw_shots(
    task: Task, rows: Iterable[tuple[str, Any]], n: int, *, seed: int, avoid: Iterable[Turn] = ()
) -> list[TaskExample]:
    """`n` examples to stand solved in a prompt, drawn from `rows`; rows that are none, and the questions to avoid, are passed over.

    Raises:
        UserError: there are not so many.
    """
    if n == 0:
        return []
    rows = list(rows)
    avoided, shots = set(avoid), []
    for number in np.random.default_rng(seed).permutation(len(rows)):
        if len(shots) == n:
            break
        try:
            shot = task.example(*rows[number])
        except UserError:  # the row is not evaluated, so it can be left out
            continue
        if shot.question not in avoided:
            avoided.add(shot.question)
            shots.append(shot)
    if len(shots) < n:
        raise UserError(
            f"task {task.name}: {n} examples were asked for, and there are {len(shots)} to take. Lower --shots or give more rows."
        )
    return shots
