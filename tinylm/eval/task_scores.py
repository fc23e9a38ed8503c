"""Evaluate a model on a task: how many answers are right,
with 0 or more solved examples before the question?

    examples ─▶ prompts, in the model's template or as plain text (`TaskPrompter`)
             ─▶ predictions: the most probable label, or a greedy answer
             ─▶ grades ─▶ TaskScore (`evaluate_task`)

Beside it: cases.py (probability of known continuations), best_of_n.py (a verifier's choice among
several answers), perplexity.py (held-out text). `format_ranks` ranks checkpoints by any of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinylm.common.errors import UserError
from tinylm.common.statistics import Measure
from tinylm.config.schema import SamplingConfig
from tinylm.eval.tasks.task import Task, TaskExample
from tinylm.generate.chat import FormattedPrompt, format_prompt
from tinylm.generate.engine import Engine, Request
from tinylm.generate.scoring import (
    Continuation,
    encode_continuation,
    fit_continuation,
    score_continuations,
)
from tinylm.rows.conversation import Conversation, Turn
from tinylm.rows.templates import Template

# The temperature at which several answers to one question are sampled
# (Cobbe et al. 2021, section 4.2).
SAMPLE_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Answer:
    """A model's answer and its grade."""

    location: str
    question: str
    output: str
    target: str
    grade: dict[str, float]
    error: str | None
    """why the model could not be asked"""


@dataclass(frozen=True)
class TaskScore:
    """The score of a model on a task."""

    task: str
    shots: int
    n_examples: int
    measures: dict[str, Measure]
    """checkpoints are ranked by the first one"""
    chance: dict[str, float]
    """the same measures of answers that ignore their question"""
    n_truncated: int
    """prompts that lost their beginning to the context"""
    n_errors: int
    """questions that the model could not be asked; they count as wrong"""
    failed: tuple[Answer, ...]
    """answers that are not fully right, the worst first"""

    @property
    def rank_key(self) -> float:
        """What checkpoints are ranked by, more is better, as displayed."""
        return round(first_measure(self.measures).value, 4)


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
        shots: solved examples before each question.
        template: the one that the model was fine-tuned with; None for a base model.
        batch_size: labels that are scored together; the engine's slots say how many free-text
            answers are generated together.
        seed: of the bootstrap intervals.
    """
    prompter = TaskPrompter(engine, task, tuple(shots), template)
    if task.labels:
        predictions = predict_labels(prompter, examples, batch_size)
    else:
        predictions = predict_texts(prompter, examples)
    outputs = [prediction.text for prediction in predictions]
    targets = [example.target for example in examples]
    failed = []
    for example, prediction in zip(examples, predictions, strict=True):
        grade = task.grade(prediction.text, example.target)
        if first_measure(grade) < 1:
            question, target = example.question.full_text, example.target
            failed.append(
                Answer(example.location, question, prediction.text, target, grade, prediction.error)
            )
    failed.sort(key=lambda answer: first_measure(answer.grade))
    return TaskScore(
        task=task.name,
        shots=len(shots),
        n_examples=len(examples),
        measures=task.score(outputs, targets, seed=seed),
        chance=task.chance(targets),
        n_truncated=sum(prediction.is_truncated for prediction in predictions),
        n_errors=sum(prediction.error is not None for prediction in predictions),
        failed=tuple(failed),
    )


def first_measure(measures: dict[str, Any]) -> Any:
    """The measure that ranks, and that makes an answer right if it is 1."""
    return next(iter(measures.values()))


@dataclass(frozen=True)
class Prediction:
    """A model's answer to one question."""

    text: str
    is_truncated: bool = False
    """whether the prompt lost its beginning"""
    error: str | None = None
    """why the model could not be asked; the text is "" then"""


@dataclass(frozen=True)
class TaskPrompter:
    """Asks a model the questions of a task: in the template it was fine-tuned with,
    or as plain text.
    """

    engine: Engine
    task: Task
    shots: tuple[TaskExample, ...]
    template: Template | None

    def request(self, example: TaskExample, **sampling: Any) -> Request:
        """The question, for the engine to answer."""
        formatted = self._format(example)
        settings = SamplingConfig(
            max_new_tokens=self.task.max_new_tokens,
            stop=self.task.stop if self.template is None else (),
            **sampling,
        )
        return Request(formatted.prompt, settings, formatted.stop_ids)

    def label_continuation(self, example: TaskExample, label: str) -> Continuation:
        """The question, and a label as its answer, to be scored."""
        if self.template is None:
            prompt = self._format(example).prompt
            return encode_continuation(self.engine, prompt, self.task.answer_separator + label)
        tokenizer, turns = self.engine.tokenizer, self._turns(example)
        prompt_ids = self.template.prompt_ids(turns, tokenizer)
        whole = self.template.encode((*turns, Turn("assistant", label)), tokenizer)
        end = int(whole.trained.nonzero()[0][-1]) + 1  # with the token that ends the answer
        return fit_continuation(self.engine, prompt_ids, whole.ids[len(prompt_ids) : end].tolist())

    def _format(self, example: TaskExample) -> FormattedPrompt:
        if self.template is None:
            return format_prompt(self.engine, self.task.text(example, self.shots), None)
        return format_prompt(self.engine, self._turns(example), self.template)

    def _turns(self, example: TaskExample) -> Conversation:
        """The solved examples as turns before the question."""
        turns = []
        for shot in self.shots:
            turns += [shot.question, Turn("assistant", shot.target)]
        return (*turns, example.question)


def predict_texts(prompter: TaskPrompter, examples: Sequence[TaskExample]) -> list[Prediction]:
    """The greedy answer to each question."""
    predictions: dict[int, Prediction] = {}
    requests: dict[int, Request] = {}
    for number, example in enumerate(examples):
        try:
            requests[number] = prompter.request(example, temperature=0)
        except UserError as error:  # must not end the other questions
            predictions[number] = Prediction("", error=str(error))
    completions = prompter.engine.complete(requests.values())
    for number, completion in zip(requests, completions, strict=True):
        predictions[number] = Prediction(completion.text.strip(), completion.truncated > 0)
    return [predictions[number] for number in range(len(examples))]


def predict_labels(
    prompter: TaskPrompter, examples: Sequence[TaskExample], batch_size: int
) -> list[Prediction]:
    """The most probable label after each question; of equally probable ones the first."""
    labels = prompter.task.labels
    asked: list[Continuation] = []
    errors: dict[int, str] = {}
    for number, example in enumerate(examples):
        try:
            asked += [prompter.label_continuation(example, label) for label in labels]
        except UserError as error:  # must not end the other questions
            errors[number] = str(error)
    scores = score_continuations(prompter.engine, asked, batch_size=batch_size)
    predictions = []
    start = 0
    for number in range(len(examples)):
        if number in errors:
            predictions.append(Prediction("", error=errors[number]))
            continue
        end = start + len(labels)
        log_probs = [score.log_prob for score in scores[start:end]]
        label = labels[log_probs.index(max(log_probs))]
        is_truncated = any(one.truncated for one in asked[start:end])
        predictions.append(Prediction(label, is_truncated))
        start = end
    return predictions


def format_ranks(keys: Sequence[Any]) -> list[str]:
    """The rank of each key, the highest key first; shared ranks are marked.

    >>> format_ranks([0.25, 0.75, 0.75, 0.5])
    ['4', '1=', '1=', '3']
    """
    ranks = []
    for key in keys:
        rank = 1 + sum(other > key for other in keys)
        is_shared = list(keys).count(key) > 1
        ranks.append(f"{rank}{'=' * is_shared}")
    return ranks
