"""A task: rows with known columns become prompts and targets, and answers become scores.

    row ─▶ TaskExample (question, target) ─▶ the model's answer ─▶ grade ─▶ Measure of all, beside chance

Each file beside this one is one task; table.py lists them. Knows nothing of models:
eval/task_scores.py asks them, and fine-tuning trains on `conversation`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinylm.common.errors import UserError
from tinylm.common.statistics import Measure, mean
from tinylm.eval.metrics import exact_match, macro_f1
from tinylm.rows.columns import CORRECT
from tinylm.rows.conversation import Conversation, Turn
from tinylm.text.row_text import kind_of, some_of

Row = Mapping[str, Any]
# Between the examples of a few-shot prompt.
SHOT_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Hub:
    """Where a task's rows are on the Hugging Face hub."""

    dataset: str
    config: str | None
    train: str
    """split to train on, and to draw solved examples from"""
    test: str
    """split with known targets to evaluate on"""


@dataclass(frozen=True)
class TaskExample:
    """One row as a question with its target."""

    location: str
    """where the row is, for messages"""
    question: Turn
    """the user's turn"""
    target: str


def accuracy(output: str, target: str) -> dict[str, float]:
    """Whether the label is right."""
    return {"accuracy": float(exact_match(output, target))}


@dataclass(frozen=True)
class Task:
    """A task: where its rows are, how a question is asked, and how an answer is graded."""

    name: str
    hub: Hub | None
    question: Callable[[Row], Turn]
    target: Callable[[Row], str]
    smoke: tuple[Row, ...]
    """rows written for this project, to try the task without data"""
    grade: Callable[[str, str], dict[str, float]] = accuracy
    """scores of an output against its target, each from 0 to 1; the first ranks,
    and 1 of it means right"""
    labels: tuple[str, ...] = ()
    """the possible answers, of which the most probable is chosen;
    (): the model generates its answer"""
    frame: tuple[str, str] = ("", "")
    """text before and after a question, for models without a template"""
    answer_separator: str = " "
    """between question and answer, for models without a template"""
    stop: tuple[str, ...] = ()
    """strings that end an answer, for models without a template: the start of the next question"""
    max_new_tokens: int = 256

    def conversation(self, row: Row) -> Conversation:
        """Question and answer of a row, for fine-tuning.

        Raises:
            UserError: a column is missing, or has nothing to ask or answer; `where` is the column.
        """
        question, target = self.question(row), self.target(row)
        if not target.strip():
            raise UserError("answer", "must not be empty", CORRECT)
        return question, Turn("assistant", target)

    def example(self, location: str, row: Row) -> TaskExample:
        """The row at `location` as an example; raises as `conversation` does, with the location."""
        try:
            question, answer = self.conversation(row)
        except UserError as error:
            raise error.within(location) from None
        return TaskExample(location, question, answer.text)

    def text(self, example: TaskExample, shots: Sequence[TaskExample] = ()) -> str:
        """The prompt of an example after solved ones, for a model without a template."""
        before, after = self.frame
        parts = []
        for shot in shots:
            question = f"{before}{shot.question.full_text}{after}"
            parts.append(f"{question}{self.answer_separator}{shot.target}")
        parts.append(f"{before}{example.question.full_text}{after}")
        return SHOT_SEPARATOR.join(parts)

    def score(
        self, outputs: Sequence[str], targets: Sequence[str], *, seed: int = 0
    ) -> dict[str, Measure]:
        """The score of at least one answer by each measure; the seed is that of the intervals."""
        grades = [
            self.grade(output, target) for output, target in zip(outputs, targets, strict=True)
        ]
        measures = {name: mean([grade[name] for grade in grades], seed=seed) for name in grades[0]}
        if self.labels:
            measures["macro_f1"] = macro_f1(outputs, targets, seed=seed)
        return measures

    def chance(self, targets: Sequence[str]) -> dict[str, float]:
        """The scores of answers that ignore their prompt: the most frequent label,
        or else the next example's target.

        Empty for a single free-text target, which has no other.
        """
        if self.labels:
            most_frequent = Counter(targets).most_common(1)[0][0]
            answers = [most_frequent] * len(targets)
        elif len(targets) > 1:
            answers = [*targets[1:], targets[0]]
        else:
            return {}
        return {name: measure.value for name, measure in self.score(answers, targets).items()}


# --- columns ---


def require_column(row: Row, column: str) -> Any:
    """The value in a column."""
    if column not in row:
        problem = f"missing; the row has {some_of(row)}"
        raise UserError(column, problem, "Correct the row, or give the data of this task")
    return row[column]


def text_of(row: Row, column: str) -> str:
    """The text in a column."""
    value = require_column(row, column)
    if not isinstance(value, str):
        raise UserError(column, f"must be a string, got {kind_of(value)}", CORRECT)
    return value


def label_of(row: Row, column: str, labels: Sequence[str]) -> str:
    """The label in a column, given by name or number.

    >>> label_of({"label": 1}, "label", ("ham", "spam")), label_of({"label": "ham"}, "label", ("ham", "spam"))
    ('spam', 'ham')
    """
    value = require_column(row, column)
    names = {}
    for number, label in enumerate(labels):
        names |= {label: label, number: label, str(number): label}
    is_label = isinstance(value, int | str) and not isinstance(value, bool)
    if is_label and value in names:
        return names[value]
    choices = ", ".join(f"{number} ({label})" for number, label in enumerate(labels))
    problem = f"must be one of {choices}, got {repr(value)[:60]}"
    raise UserError(column, problem, "Correct the row, or use another split")


# --- solved examples ---


def draw_shots(
    task: Task, rows: Iterable[tuple[str, Any]], n: int, *, seed: int, avoid: Iterable[Turn] = ()
) -> list[TaskExample]:
    """`n` solved examples for a prompt, drawn from `rows`,
    skipping bad rows and questions in `avoid`.

    Raises:
        UserError: there are fewer.
    """
    if n == 0:
        return []
    rows = list(rows)
    used = set(avoid)
    shots: list[TaskExample] = []
    for number in np.random.default_rng(seed).permutation(len(rows)):
        if len(shots) == n:
            break
        try:
            shot = task.example(*rows[number])
        except UserError:  # the row is not evaluated, so it can be skipped
            continue
        if shot.question not in used:
            used.add(shot.question)
            shots.append(shot)
    if len(shots) < n:
        raise UserError(
            f"task {task.name}",
            f"needs {n} solved examples, but only {len(shots)} are available",
            "Lower --shots, or give more rows",
        )
    return shots
