"""Best of n: is the answer that a verifier or a reward model prefers more often right than one
chosen at random or by majority?

Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems".
All methods choose among the same n answers.
"""

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from tinylm.common.errors import UserError
from tinylm.common.statistics import Measure, mean
from tinylm.eval.reward_scoring import AnswerScorer
from tinylm.eval.task_scores import SAMPLE_TEMPERATURE, TaskPrompter, first_measure
from tinylm.eval.tasks.task import Task, TaskExample
from tinylm.generate.engine import Engine
from tinylm.rows.numbers import final_number
from tinylm.rows.templates import Template


@dataclass(frozen=True)
class Candidates:
    """The sampled answers to one question, which of them are right, and what the verifier says."""

    location: str
    question: str
    target: str
    answers: tuple[str, ...]
    right: tuple[bool, ...]
    scores: tuple[float, ...]
    """by the verifier, the probability of being right; by a reward model, the reward"""
    measure: str = "probability"
    """or reward: what the scores are"""

    @property
    def accuracies(self) -> dict[str, float]:
        """The probability that each method chooses a right answer.

        >>> right, scores = (False, True, False, False), (0.1, 0.9, 0.3, 0.2)
        >>> item = Candidates("", "", "2", ("a 1", "b 2", "c 1", "no"), right, scores)
        >>> list(item.accuracies)
        ['random choice', 'majority vote', 'verifier', 'weighted vote', 'oracle']
        >>> list(item.accuracies.values())
        [0.25, 0.0, 1.0, 1.0, 1.0]
        """
        preferred = self.scores.index(max(self.scores))
        found = {
            "random choice": statistics.fmean(self.right),
            "majority vote": float(self.right[majority_vote(self.answers)]),
            "verifier": float(self.right[preferred]),
        }
        if self.measure == "probability":
            voted = weighted_vote(self.answers, self.scores)
            found["weighted vote"] = float(self.right[voted])
        return found | {"oracle": float(any(self.right))}


def majority_vote(answers: Sequence[str]) -> int:
    """The first answer whose final number is the most frequent one (Wang et al. 2022);
    0 if no answer has a number.

    >>> majority_vote(["so 3", "so 4", "it is 4.0"]), majority_vote(["none", "nothing"])
    (1, 0)
    """
    numbers = [final_number(answer) for answer in answers]
    counts = Counter(number for number in numbers if number is not None)
    return numbers.index(counts.most_common(1)[0][0]) if counts else 0


def weighted_vote(answers: Sequence[str], probabilities: Sequence[float]) -> int:
    """The first answer whose final number has the largest sum of probabilities (Li et al. 2023,
    "Making Language Models Better Reasoners with Step-Aware Verifier"); 0 if no answer has a number.

    >>> weighted_vote(["so 3", "so 4", "it is 4"], [0.7, 0.3, 0.3]), weighted_vote(["none"], [1.0])
    (0, 0)
    """
    numbers = [final_number(answer) for answer in answers]
    votes: dict[Decimal, float] = {}
    for number, probability in zip(numbers, probabilities, strict=True):
        if number is not None:
            votes[number] = votes.get(number, 0.0) + probability
    return numbers.index(max(votes, key=votes.__getitem__)) if votes else 0


@dataclass(frozen=True)
class BestOfScore:
    """How often each method chooses a right answer among n."""

    task: str
    n_samples: int
    n_examples: int
    measures: dict[str, Measure]
    """by method: random choice (expected), majority vote, verifier, weighted vote (of a verifier),
    oracle"""
    candidates: tuple[Candidates, ...]
    n_errors: int
    """questions that the model could not be asked; they count as wrong for every method"""


def best_of_n(
    engine: Engine,
    scorer: AnswerScorer,
    task: Task,
    examples: Sequence[TaskExample],
    n: int,
    *,
    template: Template | None = None,
    seed: int = 0,
) -> BestOfScore:
    """The accuracy of a verifier's choice among `n` answers, beside other choices,
    on at least one example.

    Args:
        scorer: a verifier or a reward model.
        template: the one that the model was fine-tuned with; None for a base model.
        seed: of the sampling and of the intervals.

    Raises:
        UserError: as `require_free_text_task`; or no question could be asked.
    """
    require_free_text_task(task)
    prompter = TaskPrompter(engine, task, (), template)
    asked: list[TaskExample] = []
    errors: list[UserError] = []
    for example in examples:
        try:
            prompter.request(example)
            asked.append(example)
        except UserError as error:  # must not end the other questions
            errors.append(error)
    if not asked:
        problem = f"none of {len(examples)} questions could be asked"
        raise errors[0].within(f"task {task.name}", problem)
    candidates = []
    samples = sample_answers(engine, task, asked, n, template=template, seed=seed)
    for example, answers in zip(asked, samples, strict=True):
        candidates.append(_grade_candidates(scorer, task, example, answers))
    wrong = [0.0] * len(errors)
    measures = {}
    for method in candidates[0].accuracies:
        values = [item.accuracies[method] for item in candidates]
        measures[method] = mean(values + wrong, seed=seed)
    return BestOfScore(task.name, n, len(examples), measures, tuple(candidates), len(errors))


def require_free_text_task(task: Task) -> None:
    """Raise a UserError for a task that is answered with a label:
    there are no texts to choose from.
    """
    if task.labels:
        raise UserError(
            "--best-of",
            f"task {task.name} is answered with a label; the most probable one is chosen",
            "Give a task with free-text answers",
        )


def sample_answers(
    engine: Engine,
    task: Task,
    examples: Iterable[TaskExample],
    n: int,
    *,
    template: Template | None = None,
    seed: int = 0,
) -> Iterator[list[str]]:
    """`n` answers to each example, sampled at SAMPLE_TEMPERATURE, to the prompt of `evaluate_task`
    without solved examples.
    """
    prompter = TaskPrompter(engine, task, (), template)
    requests = []
    for example in examples:
        request = prompter.request(example, temperature=SAMPLE_TEMPERATURE, seed=seed)
        requests += [replace(request, sample=sample) for sample in range(n)]
    texts = (completion.text.strip() for completion in engine.complete(requests))
    while answers := list(itertools.islice(texts, n)):
        yield answers


def _grade_candidates(
    scorer: AnswerScorer, task: Task, example: TaskExample, answers: list[str]
) -> Candidates:
    right = [first_measure(task.grade(answer, example.target)) == 1 for answer in answers]
    question = example.question.full_text
    scores = scorer.score_texts([question] * len(answers), answers)
    return Candidates(
        example.location,
        question,
        example.target,
        tuple(answers),
        tuple(right),
        tuple(scores),
        scorer.measure,
    )
