"""What a model is worth: on held-out text, on prompts with a known continuation, on tasks.

In reading order: `LanguageScore` (loss, perplexity, bits per byte, accuracy), `evaluate_cases` (how probable is the right
continuation?), `evaluate_task` (how many answers are right, with 0 or more solved examples before the question?),
`best_of_n` (what is a verifier's choice among several answers worth?), and `format_ranks`, which ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tinylm.common.errors import UserError
from tinylm.common.statistics import Measure
from tinylm.config.schema import SamplingConfig
from tinylm.eval.tasks import Task, TaskExample
from tinylm.generate.engine import Engine
from tinylm.generate.output import Completion, Prompt
from tinylm.generate.scoring import (
    Continuation,
    encode_continuation,
    fit_continuation,
    score_continuations,
)
from tinylm.rows.conversation import Conversation, Turn
from tinylm.rows.templates import Template

T = TypeVar("T")


def _result_or_error(ask: Callable[[], T]) -> T | UserError:
    """What `ask` gives, or the error that it ends with: a failing case must not end the others."""
    try:
        return ask()
    except UserError as error:
        return error


@dataclass(frozen=True)
class Answer:
    """What a model answered, and what it is worth."""

    place: str
    question: str
    output: str
    target: str
    grade: dict[str, float]
    error: str | None
    """why the model could not be asked"""


@dataclass(frozen=True)
class TaskScore:
    """What a model is worth on a task."""

    task: str
    shots: int
    n_examples: int
    measures: dict[str, Measure]
    """the first is the one to rank by"""
    chance: dict[str, float]
    """the same measures of answers that do not look at their question"""
    n_truncated: int
    """prompts that lost their beginning, because the context holds no more"""
    n_errors: int
    """questions that the model could not be asked; they count as answered wrong"""
    failed: tuple[Answer, ...]
    """answers that are not fully right, the worst first"""

    @property
    def worth(self) -> float:
        """What checkpoints are ranked by, more being better, as far as it is shown."""
        return round(next(iter(self.measures.values())).value, 4)


def evaluate_task(
    engine: Engine,
    task: Task,
    examples: Sequence[TaskExample],
    *,
    shots: Sequence[TaskExample] = (),
    template: Template | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> TaskScore:
    """The score of a model on at least one example of a task.

    Args:
        shots: solved examples that stand before each question.
        template: what the model was fine-tuned with; None for a base model.
        batch_size: labels that are scored together; answers in words are written one by one.
        seed: of the bootstrap intervals.
    """
    asker = _Predictor(engine, task, tuple(shots), template)
    outputs = (
        _predict_labels(asker, examples, batch_size)
        if task.labels
        else [
            _result_or_error(lambda example=example: asker.write(example)) for example in examples
        ]
    )
    texts = ["" if isinstance(output, UserError) else output.text for output in outputs]
    targets = [example.target for example in examples]
    errors = [str(output) if isinstance(output, UserError) else None for output in outputs]
    answers = [
        Answer(
            example.place,
            example.question.full_text,
            text,
            example.target,
            task.grade(text, example.target),
            error,
        )
        for example, text, error in zip(examples, texts, errors, strict=True)
    ]
    return TaskScore(
        task=task.name,
        shots=len(shots),
        n_examples=len(examples),
        measures=task.score(texts, targets, seed=seed),
        chance=task.chance(targets),
        n_truncated=sum(isinstance(output, _Prediction) and output.truncated for output in outputs),
        n_errors=sum(error is not None for error in errors),
        failed=tuple(
            sorted(
                (answer for answer in answers if _first(answer.grade) < 1),
                key=lambda answer: _first(answer.grade),
            )
        ),
    )


def _first(grade: dict[str, float]) -> float:
    return next(iter(grade.values()))


@dataclass(frozen=True)
class _Prediction:
    text: str
    truncated: bool


@dataclass(frozen=True)
class _Predictor:
    """Puts a task's questions to a model: in the template it was fine-tuned with, or as plain text."""

    engine: Engine
    task: Task
    shots: tuple[TaskExample, ...]
    template: Template | None

    def pair(self, example: TaskExample, label: str) -> Continuation:
        """The question, and a label as its answer."""
        if self.template is None:
            return encode_continuation(self.engine, self._plain(example), self.task.joint + label)
        before = self.template.prompt_ids(self._turns(example), self.engine.tokenizer)
        whole = self.template.encode(
            (*self._turns(example), Turn("assistant", label)), self.engine.tokenizer
        )
        end = (
            int(whole.trained.nonzero()[0][-1]) + 1
        )  # the token that ends the answer belongs to it
        return fit_continuation(self.engine, before, whole.ids[len(before) : end].tolist())

    def write(self, example: TaskExample) -> _Prediction:
        """What the model answers, greedily."""
        prompt, completions = self._answers(example, temperature=0)
        return _Prediction(completions[0].text.strip(), prompt.truncated > 0)

    def draw(self, example: TaskExample, n: int, seed: int) -> list[str]:
        """`n` answers, drawn."""
        return [
            completion.text.strip()
            for completion in self._answers(
                example, temperature=SAMPLE_TEMPERATURE, n_samples=n, seed=seed
            )[1]
        ]

    def _answers(self, example: TaskExample, **sampling: Any) -> tuple[Prompt, list[Completion]]:
        if self.template is None:
            prompt, stop, stop_ids = self._plain(example), self.task.stop, ()
        else:
            prompt = self.engine.fit_prompt(
                self.template.prompt_ids(self._turns(example), self.engine.tokenizer)
            )
            stop, stop_ids = (), self.template.stop_ids(self.engine.tokenizer)
        settings = SamplingConfig(max_new_tokens=self.task.max_new_tokens, stop=stop, **sampling)
        return prompt, self.engine.generate(prompt, settings, stop_ids=stop_ids)

    def _plain(self, example: TaskExample) -> Prompt:
        return self.engine.encode_prompt(self.task.text(example, self.shots))

    def _turns(self, example: TaskExample) -> Conversation:
        solved = (
            turn for shot in self.shots for turn in (shot.question, Turn("assistant", shot.target))
        )
        return (*solved, example.question)


def _predict_labels(
    asker: _Predictor, examples: Sequence[TaskExample], batch_size: int
) -> list[_Prediction | UserError]:
    """The label that the model finds most probable after each question; of equals the first."""
    labels = asker.task.labels
    rows = [
        _result_or_error(lambda example=example: [asker.pair(example, label) for label in labels])
        for example in examples
    ]
    scores = iter(
        score_continuations(
            asker.engine,
            [pair for row in rows if isinstance(row, list) for pair in row],
            batch_size=batch_size,
        )
    )
    outputs: list[_Prediction | UserError] = []
    for row in rows:
        if isinstance(row, UserError):
            outputs.append(row)
        else:
            log_probs = [next(scores).log_prob for _ in labels]
            outputs.append(
                _Prediction(
                    labels[log_probs.index(max(log_probs))], any(pair.truncated for pair in row)
                )
            )
    return outputs


def format_ranks(worths: Sequence[Any]) -> list[str]:
    """The place of each, more being better; those that share one are marked.

    >>> places([0.25, 0.75, 0.75, 0.5])
    ['4', '1=', '1=', '3']
    """
    return [
        f"{1 + sum(other > worth for other in worths)}{'=' * (list(worths).count(worth) > 1)}"
        for worth in worths
    ]


# What several answers to one question are drawn with (Cobbe et al. 2021, section 4.2).
SAMPLE_TEMPERATURE = 0.7
