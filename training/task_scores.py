"""Scores of named tasks while a run trains (training.eval_tasks), at its validations.

The questions are asked as evaluate_checkpoints.py asks them, greedily and without solved examples, so
that the same checkpoint on the same rows gets the same score. Nothing here draws a random number that
training uses: a resumed run continues to the same bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model import TrainingModule
from tinylm.common.errors import UserError
from tinylm.config.schema import SMOKE, Config, TrainingConfig
from tinylm.eval.task_scores import evaluate_task
from tinylm.eval.tasks.data import load_task, requested_built_in_rows
from tinylm.eval.tasks.table import EVALUATED_TASKS
from tinylm.eval.tasks.task import Task, TaskExample
from tinylm.generate.engine import Engine
from tinylm.rows.conversation import CHAT_STAGES
from tinylm.rows.row_files import read_rows
from tinylm.rows.template_factory import make_template
from tinylm.rows.templates import Template
from tinylm.runs.metrics_csv import COLUMNS
from tinylm.tokenizer.base import Tokenizer

# The value of a task in training.eval_tasks that means the rows that the run holds out.
VALIDATION = "validation"
SLOTS = 16  # answers that are generated together


@dataclass(frozen=True)
class TaskScores:
    """The tasks of a run with their rows."""

    tasks: tuple[tuple[Task, Sequence[TaskExample]], ...]
    tokenizer: Tokenizer
    template: Template | None
    """None for a base model"""
    seed: int

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of metrics.csv: each measure, and the two ends of its 95% interval."""
        names = []
        for task, examples in self.tasks:
            target = examples[0].target
            for measure in task.score([target], [target]):
                names += _columns_of(task, measure)
        return tuple(names)

    def is_due(self, step: int, training: TrainingConfig) -> bool:
        """Whether the validation of `step` has scores."""
        every = training.eval_every_steps or training.val_every_steps
        return bool(self.tasks) and (step == training.max_steps or step % every == 0)

    def score(self, module: TrainingModule, show: Callable[[str], None] | None) -> dict[str, float]:
        """The measures of every task by column; a line of each is shown."""
        row: dict[str, float] = {}
        module.eval()
        tools = module.config.data.tools
        engine = Engine(module.decoder, self.tokenizer, slots=SLOTS, tools=tools)
        for task, examples in self.tasks:
            found = evaluate_task(engine, task, examples, template=self.template, seed=self.seed)
            parts = []
            for name, measure in found.measures.items():
                values = (measure.value, measure.low, measure.high)
                row |= dict(zip(_columns_of(task, name), values, strict=True))
                interval = f"{measure.low:.3f} to {measure.high:.3f}"
                chance = f", by chance {found.chance[name]:.3f}" if name in found.chance else ""
                parts.append(f"{name} {measure.value:.3f} ({interval}{chance})")
            if show is not None:
                show(f"task {task.name}, {found.n_examples} rows: {'; '.join(parts)}")
        module.train()
        return row


def _columns_of(task: Task, measure: str) -> list[str]:
    name = f"{task.name}_{measure}"
    return [name, f"{name}_low", f"{name}_high"]


def open_tasks(module: TrainingModule, tokenizer: Tokenizer) -> TaskScores:
    """The tasks of training.eval_tasks with their rows; from now on best.ckpt is the best by
    training.best_by.

    Raises:
        UserError: rows are missing, or lack what a task needs, or best_by is no column that a
            validation fills.
    """
    config, tasks = module.config, []
    for name, source in (config.training.eval_tasks or {}).items():
        task = EVALUATED_TASKS[name]
        try:
            tasks.append((task, _examples(config, task, source)))
        except UserError as error:
            raise error.within(f"training.eval_tasks.{name}") from None
    template = None
    if module.stage in CHAT_STAGES:
        template = make_template(config.data.template, tokenizer, tools=config.data.tools)
    scores = TaskScores(tuple(tasks), tokenizer, template, config.training.seed)
    if config.training.best_by not in ("val_loss", *module.progress.measured):
        _choose_best_by(module, scores.columns)
    return scores


def _examples(config: Config, task: Task, source: str) -> Sequence[TaskExample]:
    """At most training.eval_rows rows of a task, drawn by the seed."""
    seed, limit = config.training.seed, config.training.eval_rows
    if source != VALIDATION:
        is_built_in = source == SMOKE
        path = None if is_built_in else Path(source)
        return load_task(task, path, smoke=is_built_in, limit=limit, seed=seed).examples
    data = config.data
    rows = read_rows(data, "val", seed, requested_built_in_rows(data))
    examples = [task.example(*row) for row in rows]
    numbers = np.random.default_rng(seed).permutation(len(examples))[:limit]
    return [examples[number] for number in sorted(numbers)]


def _choose_best_by(module: TrainingModule, of_tasks: Sequence[str]) -> None:
    best_by = module.config.training.best_by
    of_text = [name for name in COLUMNS if name.startswith("val_")]
    if module.stage not in ("pretrain", "sft"):
        of_text = ["val_loss"]
    columns = [*of_text, *module.val_columns, *of_tasks]
    if best_by not in columns:
        problem = f"must be one of {', '.join(columns)}, got {best_by}"
        raise UserError("training.best_by", problem, "Change it, or add a task to eval_tasks")
    module.progress.measured = {best_by: []}
