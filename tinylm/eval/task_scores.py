"""What a model is worth: on held-out text, on prompts with a known continuation, on tasks.

In reading order: `LanguageScore` (loss, perplexity, bits per byte, accuracy), `evaluate_cases` (how probable is the right
continuation?), `evaluate_task` (how many answers are right, with 0 or more solved examples before the question?),
`best_of_n` (what is a verifier's choice among several answers worth?), and `places`, which ranks.
"""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tinylm.config import SamplingConfig, read_list
from tinylm.decoder import Decoder, Features
from tinylm.engine import Completion, Engine, Pair, Prompt, Score
from tinylm.errors import UserError, printable
from tinylm.judge import Judge
from tinylm.losses import score_targets
from tinylm.metrics import Measure, final_number, mean
from tinylm.packing import IGNORE_INDEX
from tinylm.prompts import Conversation, Template, Turn
from tinylm.tasks import Example, Task
from tinylm.tokenizer import Tokenizer

T = TypeVar("T")

# exp(20) is 4.9e8, far beyond a uniform guess over any vocabulary; above it a perplexity says nothing, and exp overflows at 710.
LOSS_CAP = 20.0
# What several answers to one question are drawn with (Cobbe et al. 2021, section 4.2).
SAMPLE_TEMPERATURE = 0.7


# --- held-out text ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LanguageScore:
    """How well a model predicts a text."""

    loss: float
    """mean cross entropy of a target token, in nats"""
    tokens: int
    """target tokens"""
    n_bytes: int
    """UTF-8 bytes of the text of the targets"""
    n_right: int
    """targets that the model finds more probable than any other token"""

    @property
    def accuracy(self) -> float:
        """Share of the targets that are the most probable token."""
        return self.n_right / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the mean loss, of a loss of at most LOSS_CAP."""
        return math.exp(min(self.loss, LOSS_CAP))

    @property
    def bits_per_byte(self) -> float:
        """Bits to store one byte of the text; runs with different tokenizers compare by it."""
        return self.loss * self.tokens / math.log(2) / self.n_bytes if self.n_bytes else math.nan


def batch_sums(features: Callable[..., Features], head: nn.Linear, batch: dict[str, Any], byte_lengths: Tensor) -> Tensor:
    """(loss sum, targets, bytes of the targets' text, targets predicted right) of one batch of rows, as a float tensor (4,).

    Args:
        features: `Decoder.features`, compiled or not.
        head: the layer that scores tokens; its weight is looked at after `features`, which gathers it where it is sharded.
        byte_lengths: (V,) UTF-8 bytes that each token stands for.
    """
    labels = batch["labels"].flatten()
    hidden = features(batch["input_ids"], **beside_ids(batch)).hidden
    loss, n_right = score_targets(hidden.flatten(0, 1), head.weight, labels)
    targets = labels[labels != IGNORE_INDEX]
    return torch.stack((loss.float(), loss.new_tensor(len(targets), dtype=torch.float32), byte_lengths[targets].sum().float(), n_right.float()))


def beside_ids(batch: dict[str, Any]) -> dict[str, Tensor]:
    """What `features` is given of a batch beside its ids: to which document each belongs, or what an encoder reads."""
    return {name: batch[name] for name in ("document_ids", "prompt_ids") if name in batch}


def byte_table(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """(V,) UTF-8 bytes of each token id; ids that only pad the model's vocabulary stand for no text."""
    lengths = tokenizer.byte_lengths()
    return torch.tensor(lengths + [0] * (vocab_size - len(lengths)))


def score_batches(model: Decoder, batches: Iterable[dict[str, Any]], byte_lengths: Tensor) -> LanguageScore:
    """The score of `model`, in evaluation mode, over batches that are moved to its device."""
    device = model.embedding.weight.device
    lengths = byte_lengths.to(device)
    totals = [0.0] * 4
    with torch.no_grad():
        for batch in batches:
            moved = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
            sums = batch_sums(model.features, model.head, moved, lengths)
            totals = [total + part for total, part in zip(totals, sums.tolist(), strict=True)]
    return language_score(*totals)


def language_score(loss_sum: float, tokens: float, n_bytes: float, n_right: float) -> LanguageScore:
    """The score from sums over all batches: means are taken once, at the end, weighted by tokens.

    >>> score = language_score(loss_sum=20.0, tokens=10, n_bytes=40, n_right=3)
    >>> round(score.perplexity, 3), round(score.bits_per_byte, 3), score.accuracy
    (7.389, 0.721, 0.3)
    """
    return LanguageScore(loss_sum / tokens if tokens else math.nan, int(tokens), int(n_bytes), int(n_right))


# --- cases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A prompt and the text that should follow it, to the character: a target that is a new word begins with its space."""

    name: str
    prompt: str
    target: str


@dataclass(frozen=True)
class CaseScore:
    """What a model makes of a case: a score, or why there is none, which counts as a failure."""

    case: Case
    score: Score | None
    error: str | None

    def row(self) -> dict[str, Any]:
        """The numbers as plain values."""
        row = {"case": self.case.name, "prompt": self.case.prompt, "target": self.case.target}
        names = ("log_prob", "first_log_prob", "first_rank", "n_tokens", "greedy_match", "prompt_perplexity")
        score = self.score
        numbers = (score.log_prob, score.log_probs[0], score.ranks[0], score.n_tokens, score.greedy_match, score.prompt_perplexity) if score else (None,) * 6
        return {**row, **dict(zip(names, numbers, strict=True)), "error": self.error}


@dataclass(frozen=True)
class CasesSummary:
    """What a model makes of all cases."""

    n_cases: int
    n_failed: int
    """cases without a score: the target cannot be encoded, or fills the context"""
    n_greedy: int
    """cases whose target is what the model would write"""
    log_prob: float | None
    """mean over the scored cases of the log-probability of the whole target; None where there is none"""
    first_rank: float | None
    """median over all cases of the rank of the target's first token, that of a failed one beyond all; None where it is"""
    prompt_perplexity: float | None
    """geometric mean over the prompts"""

    @classmethod
    def of(cls, scores: Sequence[CaseScore]) -> "CasesSummary":
        """The summary of at least one case."""
        scored = [item.score for item in scores if item.score is not None]
        perplexities = [score.prompt_perplexity for score in scored if score.prompt_perplexity is not None]
        rank = statistics.median(math.inf if item.score is None else item.score.ranks[0] for item in scores)
        return cls(
            n_cases=len(scores),
            n_failed=len(scores) - len(scored),
            n_greedy=sum(score.greedy_match for score in scored),
            log_prob=statistics.fmean(score.log_prob for score in scored) if scored else None,
            first_rank=rank if math.isfinite(rank) else None,
            prompt_perplexity=statistics.geometric_mean(perplexities) if perplexities else None,
        )

    @property
    def worth(self) -> tuple[int, float]:
        """What checkpoints are ranked by, more being better: fewer failed cases first, then more probable targets, as far as they are shown."""
        return -self.n_failed, -math.inf if self.log_prob is None else round(self.log_prob, 4)


def read_cases(path: Path) -> tuple[Case, ...]:
    """The cases in a YAML file: a list of name, prompt and target.

    Raises:
        UserError: naming the file, the line and the key.
    """
    cases: dict[str, Case] = {}
    for place, item in read_list(path):
        for key in ("name", "prompt", "target"):
            if not isinstance(item.get(key), str):
                found = "nothing" if key not in item else printable(repr(item[key]))[:60]
                raise UserError(f"{place}: {key}: expected text, found {found}. Each case has name, prompt and target; quote a number.")
        if unknown := item.keys() - {"name", "prompt", "target"}:
            raise UserError(f"{place}: {printable(min(unknown))}: no such key. A case has name, prompt and target.")
        if not item["target"]:
            raise UserError(f"{place}: target: it is empty. Write the text that should follow the prompt.")
        if item["name"] in cases:
            raise UserError(f"{place}: name: {printable(item['name'])} stands above already. Give each case a name of its own.")
        cases[item["name"]] = Case(**item)
    return tuple(cases.values())


def evaluate_cases(engine: Engine, cases: Sequence[Case], *, batch_size: int = 16) -> list[CaseScore]:
    """The score of every case, in order; one that this model cannot be asked has the reason in its place."""
    pairs = [_or_error(lambda case=case: engine.encode_pair(case.prompt, case.target)) for case in cases]
    scores = iter(engine.score_pairs([pair for pair in pairs if isinstance(pair, Pair)], batch_size=batch_size))
    asked = zip(cases, pairs, strict=True)
    return [CaseScore(case, next(scores), None) if isinstance(pair, Pair) else CaseScore(case, None, str(pair)) for case, pair in asked]


def _or_error(ask: Callable[[], T]) -> T | UserError:
    """What `ask` gives, or the error that it ends with: a failing case must not end the others."""
    try:
        return ask()
    except UserError as error:
        return error


# --- tasks ------------------------------------------------------------------------------------------------------------


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
    examples: Sequence[Example],
    *,
    shots: Sequence[Example] = (),
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
    asker = _Asker(engine, task, tuple(shots), template)
    outputs = _choose(asker, examples, batch_size) if task.labels else [_or_error(lambda example=example: asker.write(example)) for example in examples]
    texts = ["" if isinstance(output, UserError) else output.text for output in outputs]
    targets = [example.target for example in examples]
    errors = [str(output) if isinstance(output, UserError) else None for output in outputs]
    answers = [
        Answer(example.place, example.question.whole, text, example.target, task.grade(text, example.target), error)
        for example, text, error in zip(examples, texts, errors, strict=True)
    ]
    return TaskScore(
        task=task.name,
        shots=len(shots),
        n_examples=len(examples),
        measures=task.score(texts, targets, seed=seed),
        chance=task.chance(targets),
        n_truncated=sum(isinstance(output, _Output) and output.truncated for output in outputs),
        n_errors=sum(error is not None for error in errors),
        failed=tuple(sorted((answer for answer in answers if _first(answer.grade) < 1), key=lambda answer: _first(answer.grade))),
    )


def _first(grade: dict[str, float]) -> float:
    return next(iter(grade.values()))


@dataclass(frozen=True)
class _Output:
    text: str
    truncated: bool


@dataclass(frozen=True)
class _Asker:
    """Puts a task's questions to a model: in the template it was fine-tuned with, or as plain text."""

    engine: Engine
    task: Task
    shots: tuple[Example, ...]
    template: Template | None

    def pair(self, example: Example, label: str) -> Pair:
        """The question, and a label as its answer."""
        if self.template is None:
            return self.engine.encode_pair(self._plain(example), self.task.joint + label)
        before = self.template.prompt_ids(self._turns(example), self.engine.tokenizer)
        whole = self.template.encode((*self._turns(example), Turn("assistant", label)), self.engine.tokenizer)
        end = int(whole.trained.nonzero()[0][-1]) + 1  # the token that ends the answer belongs to it
        return self.engine.fit_pair(before, whole.ids[len(before) : end].tolist())

    def write(self, example: Example) -> _Output:
        """What the model answers, greedily."""
        prompt, completions = self._answers(example, temperature=0)
        return _Output(completions[0].text.strip(), prompt.truncated > 0)

    def draw(self, example: Example, n: int, seed: int) -> list[str]:
        """`n` answers, drawn."""
        return [completion.text.strip() for completion in self._answers(example, temperature=SAMPLE_TEMPERATURE, n_samples=n, seed=seed)[1]]

    def _answers(self, example: Example, **sampling: Any) -> tuple[Prompt, list[Completion]]:
        if self.template is None:
            prompt, stop, stop_ids = self._plain(example), self.task.stop, ()
        else:
            prompt = self.engine.fit_prompt(self.template.prompt_ids(self._turns(example), self.engine.tokenizer))
            stop, stop_ids = (), self.template.stop_ids(self.engine.tokenizer)
        settings = SamplingConfig(max_new_tokens=self.task.max_new_tokens, stop=stop, **sampling)
        return prompt, self.engine.generate(prompt, settings, stop_ids=stop_ids)

    def _plain(self, example: Example) -> Prompt:
        return self.engine.encode_prompt(self.task.text(example, self.shots))

    def _turns(self, example: Example) -> Conversation:
        solved = (turn for shot in self.shots for turn in (shot.question, Turn("assistant", shot.target)))
        return (*solved, example.question)


def _choose(asker: _Asker, examples: Sequence[Example], batch_size: int) -> list[_Output | UserError]:
    """The label that the model finds most probable after each question; of equals the first."""
    labels = asker.task.labels
    rows = [_or_error(lambda example=example: [asker.pair(example, label) for label in labels]) for example in examples]
    scores = iter(asker.engine.score_pairs([pair for row in rows if isinstance(row, list) for pair in row], batch_size=batch_size))
    outputs: list[_Output | UserError] = []
    for row in rows:
        if isinstance(row, UserError):
            outputs.append(row)
        else:
            log_probs = [next(scores).log_prob for _ in labels]
            outputs.append(_Output(labels[log_probs.index(max(log_probs))], any(pair.truncated for pair in row)))
    return outputs


# --- several answers to a question ------------------------------------------------------------------------------------


def draw_answers(engine: Engine, task: Task, example: Example, n: int, *, template: Template | None = None, seed: int = 0) -> list[str]:
    """`n` answers to a question, drawn at SAMPLE_TEMPERATURE; the question is put as `evaluate_task` puts it, without solved ones before it."""
    return _Asker(engine, task, (), template).draw(example, n, seed)


@dataclass(frozen=True)
class Drawn:
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

        >>> Drawn("", "", "2", ("a 1", "b 2", "c 1", "no"), (False, True, False, False), (0.1, 0.9, 0.3, 0.2)).shares
        {'random choice': 0.25, 'majority vote': 0.0, 'verifier': 1.0, 'oracle': 1.0}
        """
        return {
            "random choice": statistics.fmean(self.right),
            "majority vote": float(self.right[vote(self.answers)]),
            "verifier": float(self.right[self.probabilities.index(max(self.probabilities))]),
            "oracle": float(any(self.right)),
        }


def vote(answers: Sequence[str]) -> int:
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
    drawn: tuple[Drawn, ...]
    n_errors: int
    """questions that the model could not be asked; they count as answered wrong by all"""


def best_of_n(engine: Engine, judge: Judge, task: Task, examples: Sequence[Example], n: int, *, template: Template | None = None, seed: int = 0) -> BestOfScore:
    """What a verifier's choice among `n` answers is worth on at least one example, beside other choices among the same answers.

    An answer is right where the task's first measure is 1. Raises as `check_choice`.

    Args:
        judge: the verifier.
        template: what the model was fine-tuned with; None for a base model.
        seed: of the draws and of the intervals.
    """
    check_choice(task)
    found = [_or_error(lambda example=example: _drawn(engine, judge, task, example, n, template, seed)) for example in examples]
    drawn = [item for item in found if isinstance(item, Drawn)]
    if not drawn:
        raise UserError(f"task {task.name}: none of {len(examples)} questions could be asked: {next(map(str, found))}")
    lost = [0.0] * (len(found) - len(drawn))
    measures = {name: mean([item.shares[name] for item in drawn] + lost, seed=seed) for name in drawn[0].shares}
    return BestOfScore(task.name, n, len(examples), measures, tuple(drawn), len(lost))


def check_choice(task: Task) -> None:
    """UserError for a task whose answers are no texts to choose from."""
    if task.labels:
        raise UserError(f"--best-of: task {task.name} is answered by a label, of which the most probable one is taken. Give a task that is answered in words.")


def _drawn(engine: Engine, judge: Judge, task: Task, example: Example, n: int, template: Template | None, seed: int) -> Drawn:
    answers = draw_answers(engine, task, example, n, template=template, seed=seed)
    right = tuple(_first(task.grade(answer, example.target)) == 1 for answer in answers)
    question = example.question.whole
    return Drawn(example.place, question, example.target, tuple(answers), right, tuple(judge.probabilities(question, answers)))


# --- ranks ------------------------------------------------------------------------------------------------------------


def places(worths: Sequence[Any]) -> list[str]:
    """The place of each, more being better; those that share one are marked.

    >>> places([0.25, 0.75, 0.75, 0.5])
    ['4', '1=', '1=', '3']
    """
    return [f"{1 + sum(other > worth for other in worths)}{'=' * (list(worths).count(worth) > 1)}" for worth in worths]
