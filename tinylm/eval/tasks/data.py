"""Where a task's examples come from: its rows on the hub, a file or folder on this machine, or the few that it brings."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinylm.common.errors import UserError, printable
from tinylm.config.schema import DataConfig, TrainingConfig
from tinylm.eval.tasks import PAIRS, TASKS
from tinylm.eval.tasks.task import Hub, Row, Task, TaskExample, draw_shots
from tinylm.rows.conversation import Conversation
from tinylm.rows.row_files import ROW_FILES, TEST_FILES, TRAIN_FILES, LocatedRow, read_rows

SMOKE = "smoke"  # what data.dataset says for the rows that a task brings


@dataclass(frozen=True)
class TaskData:
    """What is evaluated, and the solved examples that may stand before a question."""

    examples: tuple[TaskExample, ...]
    shots: tuple[TaskExample, ...]


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        UserError: there is none.
    """
    tasks = {**TASKS, PAIRS.name: PAIRS}
    if name not in tasks:
        raise UserError(f"--tasks: {printable(name)}: no such task. There are {', '.join(tasks)}.")
    return tasks[name]


def load_task(
    task: Task,
    path: Path | None,
    *,
    smoke: bool = False,
    n_shots: int = 0,
    limit: int | None = None,
    seed: int = 0,
) -> TaskData:
    """The examples of a task, at most `limit` drawn ones, and `n_shots` others that are not among them.

    Args:
        path: a file of rows, from which the solved examples are held out, or a folder with files train and test; None: the hub.
        smoke: take the rows that the task brings.

    Raises:
        UserError: nothing is there, or a row is not as the task has it; file, line and column are named.
    """
    if smoke and path is not None:
        raise UserError(
            f"--data: {printable(path)}: --smoke takes the built-in rows. Give one of the two."
        )
    if smoke:
        return _from_one_file(task, built_in_rows(task), n_shots, limit, seed)
    if path is not None and path.is_dir():
        train = _all_rows(str(_split_file(path, TRAIN_FILES))) if n_shots else ()
        return _from_splits(
            task, train, _all_rows(str(_split_file(path, TEST_FILES))), n_shots, limit, seed
        )
    if path is not None:
        return _from_one_file(task, _all_rows(str(path)), n_shots, limit, seed)
    if task.hub is None:
        raise UserError(
            f"--tasks: {task.name} has no data of its own. Give your rows: --data {task.name}=rows.jsonl"
        )
    try:
        return _from_hub(task, task.hub, n_shots, limit, seed)
    except UserError as problem:
        raise UserError(
            f"task {task.name}: {problem} Here that is --data {task.name}=PATH; --smoke needs no data."
        ) from None


def built_in_rows(task: Task) -> list[LocatedRow]:
    """The rows that the task brings, each with its place."""
    return [
        (f"{task.name}: built-in row {number}", dict(row))
        for number, row in enumerate(task.smoke, start=1)
    ]


def conversation_parser(data: DataConfig) -> Callable[[Row], Conversation] | None:
    """How the task that data.task names turns a row into a conversation; None without a task."""
    return TASKS[data.task].conversation if data.task else None


def requested_built_in_rows(data: DataConfig) -> list[LocatedRow]:
    """The rows that the task of data.task brings, where data.dataset asks for them and no file has that name; else none."""
    return (
        built_in_rows(TASKS[data.task])
        if data.task and data.dataset == SMOKE and not os.path.exists(SMOKE)
        else []
    )


def _from_hub(task: Task, hub: Hub, n_shots: int, limit: int | None, seed: int) -> TaskData:
    if (
        hub.train == hub.test
    ):  # of one split, what fine-tuning holds out for validation where its settings say nothing else
        both = DataConfig(dataset=hub.dataset, dataset_config=hub.config, split=hub.train)
        train, held_out = (
            read_rows(both, which, TrainingConfig().seed) for which in ("train", "val")
        )
        return _from_splits(task, train if n_shots else (), held_out, n_shots, limit, seed)
    test = _all_rows(hub.dataset, hub.config, hub.test)
    return _from_splits(
        task,
        _all_rows(hub.dataset, hub.config, hub.train) if n_shots else (),
        test,
        n_shots,
        limit,
        seed,
    )


def _all_rows(
    dataset: str, config: str | None = None, split: str = "train"
) -> Iterator[LocatedRow]:
    """All rows of a file or of a split on the hub: with another validation source, nothing is held out of them."""
    return read_rows(
        DataConfig(dataset=dataset, dataset_config=config, split=split, val_dataset=dataset),
        "train",
        0,
    )


def _split_file(folder: Path, names: tuple[str, ...]) -> Path:
    """The file of rows in `folder` that begins with one of the names."""
    for name in names:
        found = sorted(path for path in folder.glob(f"{name}*") if path.name.endswith(ROW_FILES))
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(
                f"--data: {printable(folder)}: {len(found)} files begin with {name}. Give one of them: {printable(found[0])}"
            )
    raise UserError(
        f"--data: {printable(folder)}: no file begins with {' or '.join(names)}. Give a file of rows ({', '.join(ROW_FILES)})."
    )


def _from_splits(
    task: Task,
    train: Iterable[LocatedRow],
    test: Iterable[LocatedRow],
    n_shots: int,
    limit: int | None,
    seed: int,
) -> TaskData:
    """Solved examples from other rows than those that are evaluated."""
    examples = _draw([task.example(*row) for row in test], limit, seed)
    shots = draw_shots(
        task, train, n_shots, seed=seed, avoid=(example.question for example in examples)
    )
    return _checked(task, examples, shots)


def _from_one_file(
    task: Task, rows: Iterable[LocatedRow], n_shots: int, limit: int | None, seed: int
) -> TaskData:
    """Solved examples held out of the rows; every number of shots up to theirs is evaluated on the same others."""
    rows = list(rows)
    examples = [task.example(*row) for row in rows]
    shots = draw_shots(task, rows, n_shots, seed=seed)
    known = {shot.question for shot in shots}
    return _checked(
        task,
        _draw([example for example in examples if example.question not in known], limit, seed),
        shots,
    )


def _draw(examples: Sequence[TaskExample], limit: int | None, seed: int) -> list[TaskExample]:
    """At most `limit` of the examples, in their order: the first ones of a sorted file would stand for nothing."""
    if limit is None or limit >= len(examples):
        return list(examples)
    return [
        examples[number]
        for number in sorted(np.random.default_rng(seed).permutation(len(examples))[:limit])
    ]


def _checked(task: Task, examples: Sequence[TaskExample], shots: Sequence[TaskExample]) -> TaskData:
    if not examples:
        raise UserError(
            f"task {task.name}: no examples are left to evaluate beside {len(shots)} solved ones. Lower --shots, or give more rows."
        )
    return TaskData(tuple(examples), tuple(shots))
