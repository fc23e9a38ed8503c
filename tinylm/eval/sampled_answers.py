"""What a model answers to many problems, kept in a file as it is written: hours of work that a kill must not undo.

A line of the file is one problem's answers. A process that was killed leaves whole lines and perhaps the beginning of one;
the next goes on behind the whole ones. Each problem's answers depend on the problem, the model and the seed alone, so that
the file is the same however often it was begun.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from filelock import FileLock

from tinylm.checkpoint.initial import fingerprint_of
from tinylm.checkpoint.load import Loaded
from tinylm.common.errors import UserError, printable, reading, writing
from tinylm.common.processes import Progress
from tinylm.eval.best_of_n import sample_answers
from tinylm.eval.task_scores import SAMPLE_TEMPERATURE
from tinylm.eval.tasks import PAIRS, TASKS, TaskExample
from tinylm.generate.engine import Engine
from tinylm.rows.template_factory import make_template
from tinylm.rows.verifier_data import Problem, grade_samples


def add_sampled_answers(
    problems: Sequence[Problem],
    loaded: Loaded,
    task_name: str | None,
    n: int,
    *,
    seed: int,
    folder: Path,
    progress: Progress,
) -> list[Problem]:
    """The problems with `n` answers of a model to each, repetitions left out, from a file in `folder` as far as they are there.

    Args:
        loaded: the model.
        task_name: what data.task says; None: a base model is given the problem as it stands.
        seed: of the draws.
        progress: told of the problems that are answered.
    """
    task, engine = TASKS[task_name] if task_name else PAIRS, Engine(loaded.model, loaded.tokenizer)
    template = make_template(loaded.template, loaded.tokenizer) if loaded.template else None
    how = [
        fingerprint_of(loaded.model),
        task.name,
        template and template.name,
        task.max_new_tokens,
        n,
        seed,
        SAMPLE_TEMPERATURE,
    ]
    what = [problem.question.full_text for problem in problems]
    path = (
        folder
        / f"answers-{hashlib.sha256(json.dumps([how, what]).encode()).hexdigest()[:16]}.jsonl"
    )

    def draw(number: int) -> list[str]:
        problem = problems[number]
        return sample_answers(
            engine,
            task,
            TaskExample(problem.place, problem.question, problem.answer),
            n,
            template=template,
            seed=seed,
        )

    answers = cached_answers(path, len(problems), draw, progress)
    return [
        replace(problem, samples=grade_samples(problem, texts))
        for problem, texts in zip(problems, answers, strict=True)
    ]


def cached_answers(
    path: Path, n_problems: int, draw: Callable[[int], list[str]], progress: Progress
) -> Iterator[list[str]]:
    """The answers to problems 0 to n_problems - 1: those in the file `path`, then those that `draw` gives, which are added to it.

    A second process that wants the file waits for the first.

    Raises:
        UserError: the file is damaged, or cannot be written.
    """
    with writing(path, "data.cache_dir"):
        path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        known = _whole_lines(path)
        yield from known
        for number in range(len(known), n_problems):
            texts = draw(number)
            with writing(path, "data.cache_dir"), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(texts) + "\n")
            progress("answered problems", number + 1, n_problems)
            yield texts


def _whole_lines(path: Path) -> list[list[str]]:
    """The answers in the file; the beginning of a line at its end is cut off."""
    if not path.exists():
        return []
    with reading(path), open(path, "r+b") as file:
        raw = file.read()
        whole = raw[: raw.rfind(b"\n") + 1]
        os.ftruncate(file.fileno(), len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError:
        raise UserError(
            f"{printable(path)}: damaged: not the lines that were written. Delete it: it is made again."
        ) from None
