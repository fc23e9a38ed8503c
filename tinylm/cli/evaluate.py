"""What `evaluate_checkpoints.py` does: ask every model the same questions, rank, print, write.

evaluate            the steps in order
read_questions      the flags as cases, tasks and a verifier, checked before any model is loaded
ask                 one model on all questions
"""

import argparse
import logging
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from tinylm.cli.results import Results, print_results, write_results
from tinylm.cli.subjects import OpenedSubject, find_subjects, open_subject
from tinylm.common.device import pick_device
from tinylm.common.errors import UserError, no_folder, not_found
from tinylm.eval.best_of_n import best_of_n, require_free_text_task
from tinylm.eval.cases import Case, CasesSummary, evaluate_cases, read_cases
from tinylm.eval.lm_eval import check_tasks, run_harness
from tinylm.eval.reward_scoring import AnswerScorer, load_scorer
from tinylm.eval.task_scores import TaskScore, evaluate_task
from tinylm.eval.tasks.data import TaskData, load_task
from tinylm.eval.tasks.table import find_task
from tinylm.eval.tasks.task import Task

logger = logging.getLogger(__name__)


def evaluate(arguments: argparse.Namespace) -> int:
    """Ask every model all questions, rank them, print the tables and write the files.

    Raises:
        UserError: a flag is wrong, or every model failed.
    """
    subjects = find_subjects(arguments)
    device, reason = pick_device(arguments.device)
    questions = read_questions(arguments, device)
    logger.info("device: %s (%s)", device, reason)
    results = Results()
    for subject in subjects:
        try:
            opened = open_subject(
                subject,
                device,
                arguments,
                slots=arguments.batch_size,
                deterministic=arguments.deterministic,
            )
            if subject.is_hf:
                logger.info("model: %s", subject.label)
            else:
                logger.info("checkpoint: %s, step %d", subject.label, opened.step)
            results.add(ask(opened, questions, arguments))
        except UserError as error:
            results.failed.append({"checkpoint": subject.label, "error": str(error)})
    results.rank()
    print_results(results)
    write_results(results, arguments.out)
    logger.info(
        "results: %s has all numbers; %d files next to it have the wrong answers",
        arguments.out / "results.json",
        len(results.answers),
    )
    if len(results.failed) == len(subjects):
        raise UserError(
            "--checkpoints, --model",
            f"all {len(subjects)} failed",
            "Give others; `python list.py` lists the checkpoints",
        )
    logger.info(
        "next: python infer.py --ckpt FILE --prompt TEXT, with the checkpoint of your choice"
    )
    return 0


# --- questions --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Questions:
    """What every model is asked."""

    cases: dict[str, tuple[Case, ...]]
    """by file"""
    tasks: list[tuple[Task, TaskData]]
    shots: tuple[int, ...]
    harness_tasks: tuple[str, ...]
    verifier: AnswerScorer | None
    """chooses among the answers of --best-of"""


def read_questions(arguments: argparse.Namespace, device: str) -> Questions:
    """All questions that the flags name, read and checked.

    Raises:
        UserError: there are none, or a flag is wrong.
    """
    if not (arguments.cases or arguments.tasks or arguments.lm_eval):
        raise UserError(
            "--cases, --tasks, --lm-eval",
            "nothing to evaluate",
            "Give --cases cases/wiki_basics.yaml, --tasks gsm8k --smoke, or --lm-eval NAME",
        )
    if arguments.include_path is not None and not arguments.include_path.is_dir():
        raise UserError(
            ("--include-path", arguments.include_path),
            no_folder(arguments.include_path),
            "Give the folder with the YAML files of the tasks",
        )
    shots = tuple(sorted({parse_shots(word) for word in arguments.shots or ("0",)}))
    paths = dict(parse_data(text, arguments.tasks) for text in arguments.data)
    tasks = [find_task(name) for name in arguments.tasks]
    data = [
        load_task(
            task,
            paths.get(task.name),
            smoke=arguments.smoke,
            n_shots=max(shots),
            limit=arguments.limit,
            seed=arguments.seed,
        )
        for task in tasks
    ]
    if arguments.lm_eval:
        check_tasks(arguments.lm_eval, arguments.include_path)
    return Questions(
        cases={str(path): read_cases(path) for path in arguments.cases},
        tasks=list(zip(tasks, data, strict=True)),
        shots=shots,
        harness_tasks=arguments.lm_eval,
        verifier=load_verifier(arguments, tasks, device),
    )


def load_verifier(
    arguments: argparse.Namespace, tasks: list[Task], device: str
) -> AnswerScorer | None:
    """The verifier or reward model of --best-of, or None without it.

    Raises:
        UserError: --verifier is neither, or a task has no answers to choose from.
    """
    if (arguments.best_of is None) != (arguments.verifier is None):
        raise UserError(
            "--best-of, --verifier",
            "each needs the other",
            "Give --best-of 8 --verifier FILE, or neither",
        )
    if arguments.verifier is None:
        return None
    if not tasks:
        raise UserError("--best-of", "needs a task", "Give --tasks gsm8k")
    for task in tasks:
        require_free_text_task(task)
    return load_scorer(arguments.verifier, device)


def parse_shots(word: str) -> int:
    """A number of --shots."""
    if not re.fullmatch("[0-9]{1,4}", word):
        raise UserError("--shots", f"must be whole numbers such as 0,4, got {word}")
    return int(word)


def parse_data(text: str, tasks: tuple[str, ...]) -> tuple[str, Path]:
    """The task and the path of one --data."""
    name, equals, path = text.partition("=")
    if not equals or name not in tasks:
        known = ", ".join(tasks) or "none"
        raise UserError(
            "--data", f"must be NAME=PATH with a name from --tasks ({known}), got {text}"
        )
    if not os.path.exists(path):
        raise UserError(
            ("--data", path),
            not_found(path),
            "Give a file of rows, or a folder with train and test",
        )
    return name, Path(path)


# --- one model on all questions ---------------------------------------------------------------


def ask(opened: OpenedSubject, questions: Questions, arguments: argparse.Namespace) -> Results:
    """The results of one model on all questions."""
    results = Results()
    ask_cases(opened, questions, arguments, results)
    ask_tasks(opened, questions, arguments, results)
    if questions.verifier is not None:
        ask_best_of(opened, questions, arguments, results)
    if questions.harness_tasks:
        ask_harness(opened, questions, arguments, results)
    return results


def ask_cases(
    opened: OpenedSubject, questions: Questions, arguments: argparse.Namespace, results: Results
) -> None:
    """Add the scores on the cases of each file."""
    for file, cases in questions.cases.items():
        scores = evaluate_cases(opened.engine, cases, batch_size=arguments.batch_size)
        summary = CasesSummary.of(scores)
        results.cases.append(
            {"file": file, **opened.row, **asdict(summary), "rank_key": summary.rank_key}
        )
        results.case_scores += [{"file": file, **opened.row, **score.row()} for score in scores]


def ask_tasks(
    opened: OpenedSubject, questions: Questions, arguments: argparse.Namespace, results: Results
) -> None:
    """Add the scores on our own tasks, with each number of shots."""
    for task, data in questions.tasks:
        for n_shots in questions.shots:
            score = evaluate_task(
                opened.engine,
                task,
                data.examples,
                shots=data.shots[:n_shots],
                template=opened.template,
                batch_size=arguments.batch_size,
                seed=arguments.seed,
            )
            log_problems(score)
            for name, measure in score.measures.items():
                results.measures.append(
                    {
                        "task": score.task,
                        "shots": score.shots,
                        "measure": name,
                        **opened.row,
                        **asdict(measure),
                        "chance": score.chance.get(name),
                        "n_examples": score.n_examples,
                        "rank_key": round(measure.value, 4),
                    }
                )
            file = f"failed-{opened.subject.slug}-{score.task}-{score.shots}shots.jsonl"
            results.answers[file] = score.failed


def log_problems(score: TaskScore) -> None:
    """Log how many prompts were truncated and how many questions could not be asked."""
    name = f"{score.task}, {score.shots} shots"
    if score.n_truncated:
        logger.info(
            "%s: %d of %d prompts are longer than the context and lost their beginning",
            name,
            score.n_truncated,
            score.n_examples,
        )
    if score.n_errors:
        logger.info(
            "%s: %d of %d questions could not be asked and count as wrong: %s",
            name,
            score.n_errors,
            score.n_examples,
            score.failed[0].error,
        )


def ask_best_of(
    opened: OpenedSubject, questions: Questions, arguments: argparse.Namespace, results: Results
) -> None:
    """Add how often each way to choose among several answers is right."""
    assert questions.verifier is not None
    for task, data in questions.tasks:
        score = best_of_n(
            opened.engine,
            questions.verifier,
            task,
            data.examples,
            arguments.best_of,
            template=opened.template,
            seed=arguments.seed,
        )
        if score.n_errors:
            logger.info(
                "%s: %d of %d questions could not be asked and count as wrong",
                task.name,
                score.n_errors,
                score.n_examples,
            )
        for choice, measure in score.measures.items():
            results.best_of.append(
                {
                    "task": task.name,
                    "n": score.n_samples,
                    **opened.row,
                    "n_examples": score.n_examples,
                    "choice": choice,
                    **asdict(measure),
                }
            )
        results.answers[f"best-of-{opened.subject.slug}-{task.name}.jsonl"] = score.candidates


def ask_harness(
    opened: OpenedSubject, questions: Questions, arguments: argparse.Namespace, results: Results
) -> None:
    """Add the scores on the harness's tasks; without --shots each task has its own number."""
    template = opened.template
    stop_ids = template.stop_ids(opened.engine.tokenizer) if template else ()
    for n_shots in questions.shots if arguments.shots else (None,):
        scores = run_harness(
            opened.engine,
            questions.harness_tasks,
            shots=n_shots,
            include_path=arguments.include_path,
            limit=arguments.limit,
            batch_size=arguments.batch_size,
            stop_ids=stop_ids,
        )
        for score in scores:
            low, high = score.interval
            results.measures.append(
                {
                    "task": score.task,
                    "shots": n_shots,
                    "measure": score.measure,
                    **opened.row,
                    "value": score.value,
                    "low": low,
                    "high": high,
                    "chance": None,
                    "n_examples": score.n_examples,
                    "rank_key": score.rank_key,
                }
            )
