"""A model's answers to many problems, cached while they are sampled:
hours of work that a kill must not undo.

    answers-HASH.jsonl    line i: the answers to problem i

A killed process leaves whole lines and perhaps part of one; the next process removes that part and
continues. The answers to a problem are a function of the problem, the model and the seed, so the
file is the same after any restart.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tinylm.checkpoint.load import Loaded, fingerprint_of, load_model
from tinylm.common.console import OnProgress
from tinylm.common.errors import UserError
from tinylm.common.files import locked, read_regular, writing
from tinylm.config.schema import Config, VerifierConfig
from tinylm.eval.best_of_n import sample_answers
from tinylm.eval.task_scores import SAMPLE_TEMPERATURE
from tinylm.eval.tasks.table import PAIRS, TASKS
from tinylm.eval.tasks.task import TaskExample
from tinylm.generate.engine import Engine
from tinylm.rows.verifier_data import (
    Problem,
    grade_samples,
)

logger = logging.getLogger(__name__)
# Answers that are sampled together.
SLOTS = 32


def add_sampled_answers(
    problems: Sequence[Problem],
    loaded: Loaded,
    task_name: str | None,
    n: int,
    *,
    seed: int,
    folder: Path,
    on_progress: OnProgress | None,
) -> list[Problem]:
    """The problems with `n` answers of a model to each, repetitions removed, cached in `folder`.

    A problem whose answer is wrong by its label gets none: there is nothing to compare them with.

    Args:
        loaded: the model.
        task_name: data.task; None: a base model gets the problem as its prompt.
        seed: of the sampling.
        on_progress: called with the number of answered problems.
    """
    task = TASKS[task_name] if task_name else PAIRS
    # Deterministic: which answers are sampled together depends on where a killed process ended.
    engine = Engine.of(loaded, slots=SLOTS, deterministic=True)
    template = loaded.make_template()
    # What the answers depend on names the file.
    settings = [
        fingerprint_of(loaded.model),
        task.name,
        template and template.name,
        task.max_new_tokens,
        n,
        seed,
        SAMPLE_TEMPERATURE,
    ]
    asked = [problem for problem in problems if problem.is_right]
    questions = [problem.question.full_text for problem in asked]
    digest = hashlib.sha256(json.dumps([settings, questions]).encode()).hexdigest()[:16]

    def sample_from(first: int) -> Iterator[list[str]]:
        examples = []
        for problem in asked[first:]:
            examples.append(TaskExample(problem.location, problem.question, problem.answer))
        return sample_answers(engine, task, examples, n, template=template, seed=seed)

    path = folder / f"answers-{digest}.jsonl"
    answers = iter(list(cached_answers(path, len(asked), sample_from, on_progress)))
    return [
        replace(problem, samples=grade_samples(problem, next(answers)))
        if problem.is_right
        else problem
        for problem in problems
    ]


def cached_answers(
    path: Path,
    n_problems: int,
    sample_from: Callable[[int], Iterator[list[str]]],
    on_progress: OnProgress | None,
) -> Iterator[list[str]]:
    """The answers to problems 0 to n_problems - 1: first those in the file `path`, then new ones,
    which it appends: `sample_from` gives those of a problem and all after it.

    A second process that wants the file waits for the first.

    Raises:
        UserError: the file is damaged, or cannot be written.
    """
    with locked(path, "data.cache_dir"):
        known = _read_whole_lines(path)
        yield from known
        missing = range(len(known), n_problems)
        for number, texts in zip(missing, sample_from(len(known)), strict=True):
            with writing(path, "data.cache_dir"), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(texts) + "\n")
            if on_progress is not None:
                on_progress("answering problems", number + 1, n_problems)
            yield texts


def _read_whole_lines(path: Path) -> list[list[str]]:
    """The answers in the file; a partial line at its end is removed."""
    if not path.exists():
        return []
    raw = read_regular(path)
    whole = raw[: raw.rfind(b"\n") + 1]
    if whole != raw:
        with writing(path, "data.cache_dir"):
            os.truncate(path, len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError:
        problem = "damaged: not the lines that were written"
        raise UserError(path, problem, "Delete it: it will be made again") from None


def answerer(
    config: Config, verifier: VerifierConfig, device: str, on_progress: OnProgress | None
) -> Callable[[list[Problem]], list[Problem]]:
    """A function that adds to problems the answers of the model
    that verifier.sampled_from names.
    """
    folder = Path(config.data.cache_dir)
    assert verifier.sampled_from is not None
    try:
        loaded = load_model(Path(verifier.sampled_from), device)
    except UserError as error:
        raise error.within("verifier.sampled_from") from None

    def with_answers(found: list[Problem]) -> list[Problem]:
        n_asked = sum(problem.is_right for problem in found)
        logger.info(
            f"answers: {verifier.n_sampled} by {verifier.sampled_from} to each of {n_asked:,} "
            f"problems, cached in {folder}"
        )
        return add_sampled_answers(
            found,
            loaded,
            config.data.task,
            verifier.n_sampled,
            seed=config.training.seed,
            folder=folder,
            on_progress=on_progress,
        )

    return with_answers
