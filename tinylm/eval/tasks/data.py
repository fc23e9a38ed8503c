"""Where a task's rows come from: the hub, a local file or folder,
or the few built-in ones (--smoke).
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinylm.common.errors import UserError
from tinylm.config.schema import SMOKE, Config, DataConfig, TrainingConfig
from tinylm.eval.tasks.table import TASKS
from tinylm.eval.tasks.task import Hub, Row, Task, TaskExample, draw_shots
from tinylm.rows.conversation import Conversation
from tinylm.rows.row_files import (
    ROW_FILES,
    TEST_FILES,
    TRAIN_FILES,
    LocatedRow,
    read_rows,
)
from tinylm.rows.skipped_rows import RowReport
from tinylm.rows.verifier_data import Problem, read_problems
from tinylm.text.contamination import LEAST_WORDS
from tinylm.text.shingles import words_of
from tinylm.text.sources import Which, list_kinds

# --- for fine-tuning ---


def with_data_of_task(config: Config) -> Config:
    """The settings with the hub dataset of data.task filled in,
    if there is a task and data.dataset is not given.
    """
    data = config.data
    if data.task is None or "dataset" in data.model_fields_set:
        return config
    hub = TASKS[data.task].hub
    assert hub is not None, "only pairs has none, and data.task cannot name it"
    of_task = {
        "dataset": hub.dataset,
        "dataset_config": data.dataset_config or hub.config,
        "split": hub.train,
    }
    return config.model_copy(update={"data": data.model_copy(update=of_task)})


def conversation_parser(data: DataConfig) -> Callable[[Row], Conversation] | None:
    """How the task that data.task names turns a row into a conversation; None without a task."""
    return TASKS[data.task].conversation if data.task else None


def problems_of(config: Config, which: Which, report: RowReport | None = None) -> list[Problem]:
    """The problems of a split of a verifier's config, in the form of data.task if it is set;
    raises as `read_problems`.
    """
    data = config.data
    return read_problems(
        data,
        which,
        config.training.seed,
        to_conversation=conversation_parser(data),
        built_in=requested_built_in_rows(data),
        report=report,
    )


def requested_built_in_rows(data: DataConfig) -> list[LocatedRow]:
    """The built-in rows of data.task if data.dataset is "smoke", and no file has that name;
    else [].
    """
    if data.task and data.dataset == SMOKE and not os.path.exists(SMOKE):
        return built_in_rows(TASKS[data.task])
    return []


def built_in_rows(task: Task) -> list[LocatedRow]:
    """The built-in rows of a task."""
    rows = []
    for number, row in enumerate(task.smoke, start=1):
        rows.append((f"{task.name}: built-in row {number}", dict(row)))
    return rows


# --- for evaluation ---


def evaluation_texts(examples: Iterable[TaskExample]) -> Iterator[tuple[str, str]]:
    """The texts of examples that no training document may contain, each with where its row is.

    What all rows have, such as `Summarize this dialogue.`, says nothing about one of them. Question and
    input are also compared joined if one of them is too short to be compared alone.
    """
    examples = list(examples)
    parts = [(one.question.text, one.question.input, one.target) for one in examples]
    n_rows = Counter(text for texts in parts for text in {*texts})
    for example, texts in zip(examples, parts, strict=True):
        own = [text if n_rows[text] == 1 or n_rows[text] < len(examples) else "" for text in texts]
        for text in filter(None, own):
            yield example.location, text
        asked = [text for text in own[:2] if text]
        if len(asked) == 2 and any(len(words_of(text)) < LEAST_WORDS for text in asked):
            yield example.location, "\n".join(asked)


@dataclass(frozen=True)
class TaskData:
    """The examples to evaluate, and solved examples to put before a question."""

    examples: tuple[TaskExample, ...]
    shots: tuple[TaskExample, ...]


def load_task(
    task: Task,
    path: Path | None,
    *,
    smoke: bool = False,
    n_shots: int = 0,
    limit: int | None = None,
    seed: int = 0,
) -> TaskData:
    """The examples of a task, at most `limit` drawn ones,
    and `n_shots` solved ones that are not among them.

    Args:
        path: a file of rows, from which the solved examples are held out, or a folder with files
            train* and test*; None: the hub.
        smoke: use the built-in rows.

    Raises:
        UserError: nothing is found, or a row lacks what the task needs; `where` has file,
            line and column.
    """
    if smoke and path is not None:
        raise UserError(("--data", path), "cannot be combined with --smoke", "Give one of the two")
    if smoke:
        return _from_one_file(task, built_in_rows(task), n_shots, limit, seed)
    if path is not None and path.is_dir():
        train = _all_rows(str(_split_file(path, TRAIN_FILES))) if n_shots else ()
        test = _all_rows(str(_split_file(path, TEST_FILES)))
        return _from_splits(task, train, test, n_shots, limit, seed)
    if path is not None:
        return _from_one_file(task, _all_rows(str(path)), n_shots, limit, seed)
    if task.hub is None:
        fix = f"Give your rows: --data {task.name}=rows.jsonl"
        raise UserError(("--tasks", task.name), "has no data of its own", fix)
    try:
        return _from_hub(task, task.hub, n_shots, limit, seed)
    except UserError as error:
        fix = f"Give the rows with --data {task.name}=PATH, or try --smoke, which needs no data"
        raise error.within(f"task {task.name}", fix=fix) from None


def _from_hub(task: Task, hub: Hub, n_shots: int, limit: int | None, seed: int) -> TaskData:
    if hub.train == hub.test:
        # One split: evaluate on the rows that fine-tuning with default settings holds out
        # for validation.
        data = DataConfig(dataset=hub.dataset, dataset_config=hub.config, split=hub.train)
        train, test = (read_rows(data, which, TrainingConfig().seed) for which in ("train", "val"))
    else:
        test = _all_rows(hub.dataset, hub.config, hub.test)
        train = _all_rows(hub.dataset, hub.config, hub.train) if n_shots else ()
    return _from_splits(task, train if n_shots else (), test, n_shots, limit, seed)


def _all_rows(
    dataset: str, config: str | None = None, split: str = "train"
) -> Iterator[LocatedRow]:
    """All rows of a file, or of a split on the hub: with a val_dataset,
    nothing is held out of them.
    """
    data = DataConfig(dataset=dataset, dataset_config=config, split=split, val_dataset=dataset)
    return read_rows(data, "train", 0)


def _split_file(folder: Path, prefixes: tuple[str, ...]) -> Path:
    """The file of rows in `folder` that starts with the first matching prefix."""
    for prefix in prefixes:
        files = sorted(path for path in folder.glob(f"{prefix}*") if path.name.endswith(ROW_FILES))
        if len(files) == 1:
            return files[0]
        if files:
            problem = f"{len(files)} files begin with {prefix}"
            raise UserError(("--data", folder), problem, f"Give one of them: {files[0]}")
    raise UserError(
        ("--data", folder),
        f"no file begins with {' or '.join(prefixes)}",
        f"Give a file of rows ({list_kinds(ROW_FILES)})",
    )


def _from_splits(
    task: Task,
    train: Iterable[LocatedRow],
    test: Iterable[LocatedRow],
    n_shots: int,
    limit: int | None,
    seed: int,
) -> TaskData:
    """Examples from `test`, and solved examples from `train` with other questions."""
    examples = _draw([task.example(*row) for row in test], limit, seed)
    questions = [example.question for example in examples]
    shots = draw_shots(task, train, n_shots, seed=seed, avoid=questions)
    return _task_data(task, examples, shots)


def _from_one_file(
    task: Task, rows: Iterable[LocatedRow], n_shots: int, limit: int | None, seed: int
) -> TaskData:
    """Solved examples held out of the rows, and the examples that are left."""
    rows = list(rows)
    examples = [task.example(*row) for row in rows]
    shots = draw_shots(task, rows, n_shots, seed=seed)
    solved = {shot.question for shot in shots}
    unsolved = [example for example in examples if example.question not in solved]
    return _task_data(task, _draw(unsolved, limit, seed), shots)


def _draw(examples: Sequence[TaskExample], limit: int | None, seed: int) -> list[TaskExample]:
    """At most `limit` random examples in their order:
    the first ones of a sorted file would not be representative.
    """
    if limit is None or limit >= len(examples):
        return list(examples)
    numbers = np.random.default_rng(seed).permutation(len(examples))[:limit]
    return [examples[number] for number in sorted(numbers)]


def _task_data(
    task: Task, examples: Sequence[TaskExample], shots: Sequence[TaskExample]
) -> TaskData:
    if not examples:
        raise UserError(
            f"task {task.name}",
            f"no examples are left to evaluate besides {len(shots)} solved ones",
            "Lower --shots, or give more rows",
        )
    return TaskData(tuple(examples), tuple(shots))
