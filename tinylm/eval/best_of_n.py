import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tinylm.common.errors import UserError
from tinylm.common.statistics import Measure, mean
from tinylm.eval.task_scores import _first, _Predictor, _result_or_error
from tinylm.eval.tasks import Task, TaskExample
from tinylm.eval.verifier_scoring import VerifierScorer
from tinylm.generate.engine import Engine
from tinylm.rows.numbers import final_number
from tinylm.rows.templates import Template


def sample_answers(
    engine: Engine,
    task: Task,
    example: TaskExample,
    n: int,
    *,
    template: Template | None = None,
    seed: int = 0,
) -> list[str]:
    """`n` answers to a question, drawn at SAMPLE_TEMPERATURE; the question is put as `evaluate_task` puts it, without solved ones before it."""
    return _Predictor(engine, task, (), template).draw(example, n, seed)


@dataclass(frozen=True)
class Candidates:
    """The answers to one question, and how each method of choosing one fares."""

    place: str
    question: str
    target: str
    answers: tuple[str, ...]
    right: tuple[bool, ...]
    probabilities: tuple[float, ...]
    """of being right, by the verifier"""

    @property
    def shares(self) -> dict[str, float]:
        """How likely each method gives a right answer; all choose among the same ones.

        >>> Candidates("", "", "2", ("a 1", "b 2", "c 1", "no"), (False, True, False, False), (0.1, 0.9, 0.3, 0.2)).shares
        {'random choice': 0.25, 'majority vote': 0.0, 'verifier': 1.0, 'oracle': 1.0}
        """
        return {
            "random choice": statistics.fmean(self.right),
            "majority vote": float(self.right[majority_vote(self.answers)]),
            "verifier": float(self.right[self.probabilities.index(max(self.probabilities))]),
            "oracle": float(any(self.right)),
        }


def majority_vote(answers: Sequence[str]) -> int:
    """The first of the answers that end in the number which most of them end in (Wang et al. 2022); of equally frequent ones in the first.

    >>> vote(["so 3", "so 4", "it is 4.0"]), vote(["none", "so 5"]), vote(["none", "nothing"])
    (1, 1, 0)
    """
    numbers = [final_number(answer) for answer in answers]
    counts = Counter(number for number in numbers if number is not None)
    return numbers.index(counts.most_common(1)[0][0]) if counts else 0


@dataclass(frozen=True)
class BestOfScore:
    """How well one of n answers is chosen, by each method."""

    task: str
    n_samples: int
    n_examples: int
    measures: dict[str, Measure]
    """share of right answers by random choice (expected), majority vote, verifier and oracle"""
    drawn: tuple[Candidates, ...]
    n_errors: int
    """questions that the model could not be asked; they count as answered wrong by all"""


def best_of_n(
    engine: Engine,
    judge: VerifierScorer,
    task: Task,
    examples: Sequence[TaskExample],
    n: int,
    *,
    template: Template | None = None,
    seed: int = 0,
) -> BestOfScore:
    """What a verifier's choice among `n` answers is worth on at least one example, beside other choices among the same answers.

    An answer is right where the task's first measure is 1. Raises as `require_free_text_task`.

    Args:
        judge: the verifier.
        template: what the model was fine-tuned with; None for a base model.
        seed: of the draws and of the intervals.
    """
    require_free_text_task(task)
    found = [
        _result_or_error(
            lambda example=example: _drawn(engine, judge, task, example, n, template, seed)
        )
        for example in examples
    ]
    drawn = [item for item in found if isinstance(item, Candidates)]
    if not drawn:
        raise UserError(
            f"task {task.name}: none of {len(examples)} questions could be asked: {next(map(str, found))}"
        )
    lost = [0.0] * (len(found) - len(drawn))
    measures = {
        name: mean([item.shares[name] for item in drawn] + lost, seed=seed)
        for name in drawn[0].shares
    }
    return BestOfScore(task.name, n, len(examples), measures, tuple(drawn), len(lost))


def require_free_text_task(task: Task) -> None:
    """UserError for a task whose answers are no texts to choose from."""
    if task.labels:
        raise UserError(
            f"--best-of: task {task.name} is answered by a label, of which the most probable one is taken. Give a task that is answered in words."
        )


def _drawn(
    engine: Engine,
    judge: VerifierScorer,
    task: Task,
    example: TaskExample,
    n: int,
    template: Template | None,
    seed: int,
) -> Candidates:
    answers = sample_answers(engine, task, example, n, template=template, seed=seed)
    right = tuple(_first(task.grade(answer, example.target)) == 1 for answer in answers)
    question = example.question.full_text
    return Candidates(
        example.place,
        question,
        example.target,
        tuple(answers),
        right,
        tuple(judge.probabilities(question, answers)),
    )
