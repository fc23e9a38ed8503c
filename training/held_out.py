"""Questions that every model of a list of stages is asked at the end: the same ones, held out.

    - test: data/arithmetic/test.jsonl    rows of the task
      task: gsm8k                         how they are asked and graded (tinylm/eval/tasks)
      best_of: 8                          choices of the verifier, if the list has one

    read_test     the entry, checked before anything runs
    ask_models    the accuracy of each model, with its 95% interval
    test_lines    the table

Every model answers greedily, in the template of its fine-tuning; a base model gets the task's plain
prompt. With `best_of`, the model whose answers the verifier was trained on also samples several
answers to each question, of which one is chosen: at random, by majority, by the verifier, or by one
who knows the result (`oracle`, the share of questions with at least one right answer).
"""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinylm.checkpoint.load import load_model
from tinylm.common.device import pick_device
from tinylm.common.errors import UserError, printable
from tinylm.common.files import read_regular
from tinylm.config.yaml_file import read_list
from tinylm.eval.best_of_n import best_of_n, require_free_text_task
from tinylm.eval.task_scores import evaluate_task, first_measure
from tinylm.eval.tasks.data import load_task
from tinylm.eval.tasks.table import EVALUATED_TASKS
from tinylm.eval.tasks.task import Task
from tinylm.eval.verifier_scoring import VerifierScorer
from tinylm.generate.engine import Engine
from training.pipeline import PipelineStage

logger = logging.getLogger(__name__)
# Answers that are generated together.
SLOTS = 32


@dataclass(frozen=True)
class HeldOutTest:
    """The entry of the list."""

    path: Path
    """rows of the task; made by the time the models are asked"""
    task: Task
    best_of: int | None

    def fingerprint(self) -> str:
        """Identifies the questions and how they are asked."""
        rows = hashlib.sha256(read_regular(self.path)).hexdigest()[:16]
        return f"{rows} {self.task.name} {self.best_of}"


def read_test(path: Path) -> HeldOutTest | None:
    """The entry `test` of a YAML list of stages; None if there is none.

    Raises:
        UserError: the entry is wrong, naming the file, the line and the key; or there are two.
    """
    found: HeldOutTest | None = None
    for location, item in read_list(path):
        if "test" not in item:
            continue
        if found is not None:
            raise UserError((location, "test"), "a second one", "Keep one of the two")
        found = _parse_test(location, item)
    return found


def _parse_test(location: str, item: dict[str, Any]) -> HeldOutTest:
    name, best_of = item.get("task"), item.get("best_of")
    if unknown := item.keys() - {"test", "task", "best_of"}:
        fix = "A test has the keys test, task and best_of"
        raise UserError((location, min(unknown)), "no such key", fix)
    if not isinstance(item["test"], str):
        raise UserError((location, "test"), "must be a file of rows", "Write test: rows.jsonl")
    if name not in EVALUATED_TASKS:
        fix = f"Use one of {', '.join(EVALUATED_TASKS)}"
        raise UserError((location, "task"), f"{name}: no such task", fix)
    task = EVALUATED_TASKS[name]
    if best_of is not None:
        if type(best_of) is not int or best_of < 1:
            raise UserError((location, "best_of"), f"must be a number from 1, got {best_of}")
        try:
            require_free_text_task(task)
        except UserError as error:
            raise error.within((location, "best_of")) from None
    return HeldOutTest(Path(item["test"]), task, best_of)


def ask_models(test: HeldOutTest, stages: list[PipelineStage]) -> dict[str, Any]:
    """`questions`, `task`, `n`, and `rows`: stage, answers, value, low, high of each model and way
    of answering.

    Raises:
        UserError: as `load_task`.
    """
    examples = load_task(test.task, test.path).examples
    rows = []
    for stage in stages:
        if stage.kind == "verifier":
            continue
        logger.info("test: %s", stage.model)
        device, _ = pick_device(stage.config.hardware.accelerator, key="hardware.accelerator")
        loaded = load_model(stage.model, device)
        engine, template = Engine.of(loaded, slots=SLOTS), loaded.make_template()
        score = evaluate_task(engine, test.task, examples, template=template)
        measures = {"greedy": first_measure(score.measures)}
        judge = verifier_of(stage, stages)
        if test.best_of is not None and judge is not None:
            scorer = VerifierScorer.load(judge.model, device)
            chosen = best_of_n(engine, scorer, test.task, examples, test.best_of, template=template)
            for choice, measure in chosen.measures.items():
                measures[f"best of {test.best_of}, {choice}"] = measure
        rows += [{"stage": stage.name, "answers": key, **asdict(measures[key])} for key in measures]
    return {
        "questions": str(test.path),
        "task": test.task.name,
        "n": len(examples),
        "rows": rows,
    }


def verifier_of(stage: PipelineStage, stages: list[PipelineStage]) -> PipelineStage | None:
    """The verifier that was trained on answers of this stage's model; None if there is none."""
    for other in stages:
        verifier = other.config.verifier
        if verifier is None or verifier.sampled_from is None:
            continue
        if stage.holds(verifier.sampled_from):
            return other
    return None


def terminal_rows(found: dict[str, Any]) -> list[dict[str, str]]:
    """The rows of `ask_models` for the terminal: percent right, with 95% intervals."""
    rows = []
    for row in found["rows"]:
        value, low, high = (f"{100 * row[key]:.1f}" for key in ("value", "low", "high"))
        rows.append(
            {
                "stage": row["stage"],
                "answers": row["answers"],
                "% right": value,
                "95% interval": f"{low} to {high}",
            }
        )
    return rows


def test_lines(found: dict[str, Any]) -> Iterator[str]:
    """The same for the report."""
    questions = printable(found["questions"])
    yield f"\n## {found['n']:,} held-out questions of {questions}, graded as {found['task']}\n"
    rows = terminal_rows(found)
    yield f"| {' | '.join(rows[0])} |"
    yield "|---|---|---:|---:|"
    for row in rows:
        yield f"| {' | '.join(row.values())} |"
