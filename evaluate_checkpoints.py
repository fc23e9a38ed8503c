"""Rank checkpoints, and Hugging Face models beside them: on prompts with a known continuation, on tasks, on tasks of the lm-evaluation-harness.

    python evaluate_checkpoints.py --checkpoints 'checkpoints/*.ckpt' --cases cases/wiki_basics.yaml
    python evaluate_checkpoints.py --checkpoints 'checkpoints/*.ckpt' --tasks gsm8k,sst2 --shots 0,4
    python evaluate_checkpoints.py --model gpt2 --tasks sst2 --shots 0,4
    python evaluate_checkpoints.py --checkpoints 'checkpoints/*.ckpt' --tasks gsm8k --best-of 8 --verifier checkpoints/verifier/best.ckpt

The tables go to stdout, everything else to stderr; numbers and failed answers to files under --out. A checkpoint that
cannot be read is named below the tables and counts as a failure.
"""

import argparse
import csv
import glob
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylm.cli.program import Parser, run_program
from tinylm.common.console import say
from tinylm.common.device import NAMES, pick_device
from tinylm.common.errors import UserError, printable, writing

if TYPE_CHECKING:
    from tinylm.eval.best_of_n import Candidates
    from tinylm.eval.cases import Case
    from tinylm.eval.lm_eval import HarnessScore
    from tinylm.eval.task_scores import Answer, TaskScore
    from tinylm.eval.tasks import Task
    from tinylm.eval.tasks.data import TaskData
    from tinylm.eval.verifier_scoring import VerifierScorer
    from tinylm.generate.engine import Engine
    from tinylm.rows.templates import Template

Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A checkpoint under all its names, the first of which is shown; or a Hugging Face model, by name or folder."""

    paths: tuple[Path, ...]
    is_hf: bool = False

    @property
    def label(self) -> str:
        """The file and, in brackets, its other names; hf: before the name of a Hugging Face model."""
        if self.is_hf:
            return printable(f"hf:{self.paths[0]}")
        others = ", ".join(path.stem for path in self.paths[1:])
        return printable(f"{self.paths[0]} ({others})" if others else self.paths[0])


@dataclass(frozen=True)
class Opened:
    """A model that can be asked, and what its checkpoint says of it."""

    engine: "Engine"
    template: "Template | None"
    """what it was fine-tuned with; None for a base model"""
    step: int | None
    """None, as the loss, for a Hugging Face model: it does not say"""
    val_loss: float | None


@dataclass(frozen=True)
class Questions:
    """What every checkpoint is asked."""

    cases: dict[str, "tuple[Case, ...]"]
    """by the name of their file"""
    tasks: "list[tuple[Task, TaskData]]"
    shots: tuple[int, ...]
    harness: tuple[str, ...]
    judge: "VerifierScorer | None"
    """the verifier that chooses among --best-of answers"""


@dataclass
class Results:
    """Rows of the tables, as they are written to files."""

    cases: list[Row] = field(default_factory=list)
    case_scores: list[Row] = field(default_factory=list)
    measures: list[Row] = field(default_factory=list)
    best_of: list[Row] = field(default_factory=list)
    failed: list[Row] = field(default_factory=list)
    answers: "dict[str, Sequence[Answer | Candidates]]" = field(default_factory=dict)
    """answers that are not right, and those that one was chosen among, by the name of the file for them"""

    def add(self, other: "Results") -> None:
        """Take in what another checkpoint answered."""
        self.cases += other.cases
        self.case_scores += other.case_scores
        self.measures += other.measures
        self.best_of += other.best_of
        self.answers |= other.answers


def main(argv: list[str] | None = None) -> int:
    """Run the program; the exit code comes back."""
    args = parse(argv)
    return run_program(lambda: run(args), debug=args.debug)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python evaluate_checkpoints.py",
        usage="python evaluate_checkpoints.py --checkpoints 'checkpoints/*.ckpt' --cases cases/wiki_basics.yaml",
        description="Rank checkpoints, and Hugging Face models, on cases and tasks.",
    )
    parser.add_argument(
        "--checkpoints",
        nargs="+",
        metavar="PATTERN",
        help="files or globs (checkpoints/*.ckpt, where no --model is given)",
    )
    what = "a Hugging Face name or folder, asked in plain text: a baseline by prompting; may be given several times"
    parser.add_argument("--model", action="append", default=[], metavar="NAME", help=what)
    parser.add_argument(
        "--cases",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="YAML files of cases: name, prompt, target",
    )
    parser.add_argument(
        "--tasks",
        type=words,
        default=(),
        metavar="NAME,...",
        help="sst2, samsum, gsm8k, sms, alpaca, or pairs (your own rows)",
    )
    parser.add_argument(
        "--shots",
        type=words,
        metavar="N,...",
        help="solved examples before each question (0; for --lm-eval as its tasks say)",
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a task's rows: a file, or a folder with train and test",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="a dozen built-in rows a task, to try it without data"
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="at most N examples a task, drawn by --seed"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the drawn examples and of the bootstrap (0)",
    )
    parser.add_argument(
        "--lm-eval",
        type=words,
        default=(),
        metavar="NAME,...",
        help="tasks of the lm-evaluation-harness (pip install lm_eval)",
    )
    parser.add_argument(
        "--include-path",
        type=Path,
        metavar="FOLDER",
        help="YAML tasks for --lm-eval, in place of its own",
    )
    parser.add_argument(
        "--best-of",
        type=positive,
        metavar="N",
        help="draw N answers to each question, and choose one at random, by vote, by --verifier",
    )
    parser.add_argument(
        "--verifier",
        type=Path,
        metavar="FILE",
        help="checkpoint of the verifier that chooses (finetune.py --config configs/verifier.yaml)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=16,
        metavar="N",
        help="texts that are scored together (16)",
    )
    parser.add_argument(
        "--tokenizer",
        default="auto",
        metavar="NAME",
        help="auto: the one in the checkpoint; else byte, or a Hugging Face name or folder",
    )
    parser.add_argument(
        "--device", choices=NAMES, default="auto", help="auto: CUDA, else MPS, else the CPU"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results"),
        metavar="FOLDER",
        help="folder for the numbers and the failed answers (results)",
    )
    return parser.parse_args(argv)


def words(text: str) -> tuple[str, ...]:
    """The parts of a list with commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def positive(text: str) -> int:
    """A whole number from 1."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def run(args: argparse.Namespace) -> int:
    """Ask every checkpoint, rank, show, and write."""
    patterns = args.checkpoints or ([] if args.model else ["checkpoints/*.ckpt"])
    subjects = [
        *find_subjects(patterns),
        *(Subject((Path(name),), is_hf=True) for name in hf_names(args.model)),
    ]
    device, why = pick_device(args.device)
    questions = prepare(
        args, device
    )  # a mistake in them is told before the seconds that loading takes
    say(f"device: {device} ({why})")
    results = Results()
    for subject in subjects:
        try:
            opened = (
                open_model(subject, device)
                if subject.is_hf
                else open_checkpoint(subject, device, args.tokenizer)
            )
            say(
                f"model: {subject.label}"
                if subject.is_hf
                else f"checkpoint: {subject.label}, step {opened.step}"
            )
            results.add(ask(subject, opened, questions, args))
        except UserError as error:
            results.failed.append({"checkpoint": subject.label, "error": str(error)})
    rank(results)
    show(results)
    write(results, args.out)
    say(
        f"{printable(args.out / 'results.json')} has all numbers, {len(results.answers)} files beside it the answers that are not right"
    )
    if len(results.failed) == len(subjects):
        raise UserError(
            f"all {len(subjects)} checkpoints and models failed. Give others; `python list.py` shows what there is."
        )
    say("next: python infer.py --ckpt FILE --prompt TEXT, with the checkpoint that suits you")
    return 0


# --- what is asked, and who -------------------------------------------------------------------------------------------


def hf_names(given: Sequence[str]) -> list[str]:
    """The names of --model, each once; with hf: before them, as training.init_from has them, they are the same."""
    return list(dict.fromkeys(name.removeprefix("hf:") for name in given))


def find_subjects(patterns: Sequence[str]) -> list[Subject]:
    """The checkpoints that the patterns name; names of one file (last, best, final are links) make one subject.

    Raises:
        UserError: there are patterns, and none matches.
    """
    files: dict[tuple[int, ...] | Path, list[Path]] = {}
    for pattern in patterns:
        paths = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        for path in map(Path, paths):
            same = files.setdefault(identity(path), [])
            if path not in same:
                same.append(path)
    if patterns and not files:
        raise UserError(
            f"--checkpoints: {printable(' '.join(patterns))}: nothing matches. Train a model first: python train.py --config config_smoke.yaml"
        )
    return [
        Subject(tuple(sorted(paths, key=lambda path: (not path.name.startswith("step-"), path))))
        for paths in files.values()
    ]


def identity(path: Path) -> tuple[int, ...] | Path:
    """What is the same for all names of one file."""
    try:
        status = os.stat(path)
    except OSError:  # told when it is opened
        return path
    return status.st_dev, status.st_ino


def prepare(args: argparse.Namespace, device: str) -> Questions:
    """All questions, read and checked.

    Raises:
        UserError: there are none, or one is not as it should be.
    """
    from tinylm.eval.cases import read_cases
    from tinylm.eval.lm_eval import check_tasks
    from tinylm.eval.tasks.data import find_task, load_task

    if not (args.cases or args.tasks or args.lm_eval):
        raise UserError(
            "nothing to evaluate. Give --cases cases/wiki_basics.yaml, --tasks gsm8k --smoke, or --lm-eval NAME."
        )
    if args.include_path is not None and not args.include_path.is_dir():
        raise UserError(
            f"--include-path: {printable(args.include_path)}: no such folder. Give the one with the YAML files of the tasks."
        )
    shots = tuple(sorted({number_of_shots(word) for word in args.shots or ("0",)}))
    paths = dict(source_of(text, args.tasks) for text in args.data)
    tasks = [find_task(name) for name in args.tasks]
    loaded = [
        (
            task,
            load_task(
                task,
                paths.get(task.name),
                smoke=args.smoke,
                n_shots=max(shots),
                limit=args.limit,
                seed=args.seed,
            ),
        )
        for task in tasks
    ]
    if args.lm_eval:
        check_tasks(args.lm_eval, args.include_path)
    return Questions(
        {str(path): read_cases(path) for path in args.cases},
        loaded,
        shots,
        args.lm_eval,
        find_judge(args, tasks, device),
    )


def find_judge(
    args: argparse.Namespace, tasks: "Sequence[Task]", device: str
) -> "VerifierScorer | None":
    """The verifier that chooses among several answers, if that is asked for.

    Raises:
        UserError: it is not one, or there is nothing to choose.
    """
    from tinylm.eval.best_of_n import require_free_text_task
    from tinylm.eval.verifier_scoring import VerifierScorer

    if (args.best_of is None) != (args.verifier is None):
        raise UserError(
            "--best-of, --verifier: each needs the other. Give --best-of 8 --verifier FILE, or neither."
        )
    if args.verifier is None:
        return None
    if not tasks:
        raise UserError("--best-of: there is no task to answer. Give --tasks gsm8k.")
    for task in tasks:
        require_free_text_task(task)
    return VerifierScorer.load(args.verifier, device)


def number_of_shots(word: str) -> int:
    """A number of --shots."""
    if not re.fullmatch("[0-9]{1,4}", word):
        raise UserError(f"--shots: {printable(word)}: expected whole numbers, such as 0,4.")
    return int(word)


def source_of(text: str, tasks: Sequence[str]) -> tuple[str, Path]:
    """The task and the path of one --data."""
    name, equals, path = text.partition("=")
    if not equals or name not in tasks:
        raise UserError(
            f"--data: {printable(text)}: expected NAME=PATH with a name that --tasks has ({', '.join(tasks) or 'none'})."
        )
    if not os.path.exists(path):
        raise UserError(
            f"--data: {printable(path)}: not found. Give a file of rows, or a folder with train and test."
        )
    return name, Path(path)


def open_checkpoint(subject: Subject, device: str, tokenizer: str) -> Opened:
    """The model of a checkpoint, with the template of its fine-tuning where there was one.

    Raises:
        UserError: it is damaged, or its weights are no numbers.
    """
    from tinylm.checkpoint.load import load_model
    from tinylm.cli.loading import choose_tokenizer
    from tinylm.generate.engine import Engine
    from tinylm.rows.template_factory import make_template

    loaded = load_model(subject.paths[0], device)
    if not all(weight.isfinite().all() for weight in loaded.model.parameters()):
        raise UserError(
            f"{printable(subject.paths[0])}: there are weights that are not finite numbers; its training diverged. Use an earlier checkpoint."
        )
    engine = Engine(loaded.model, choose_tokenizer(tokenizer, loaded.tokenizer))
    template = make_template(loaded.template, engine.tokenizer) if loaded.template else None
    return Opened(engine, template, loaded.info.step, loaded.info.val_loss)


def open_model(subject: Subject, device: str) -> Opened:
    """A Hugging Face model, which is asked in plain text.

    Raises:
        UserError: it is not there, or is none that writes text.
    """
    from tinylm.generate.engine import Engine
    from tinylm.model.hf_files import find_hf_model
    from tinylm.tokenizer.hf_files import load_hf_tokenizer

    name = str(subject.paths[0])
    model, tokenizer = find_hf_model(name).load().to(device).eval(), load_hf_tokenizer(name)
    if model.embedding.num_embeddings < tokenizer.vocab_size:
        sizes = f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.embedding.num_embeddings}"
        raise UserError(f"--model: {printable(name)}: {sizes}. Download both again.")
    return Opened(Engine(model, tokenizer), None, None, None)


# --- asking -----------------------------------------------------------------------------------------------------------


def ask(
    subject: Subject, opened: Opened, questions: Questions, args: argparse.Namespace
) -> Results:
    """What one checkpoint answers to everything."""
    who = {"checkpoint": subject.label, "step": opened.step, "val_loss": opened.val_loss}
    results = Results()
    ask_cases(who, opened, questions, args, results)
    ask_tasks(who, subject, opened, questions, args, results)
    ask_best_of(who, subject, opened, questions, args, results)
    if questions.harness:
        ask_harness(who, opened, questions, args, results)
    return results


def ask_cases(
    who: Row, opened: Opened, questions: Questions, args: argparse.Namespace, results: Results
) -> None:
    """Add the scores of the cases of each file."""
    from tinylm.eval.cases import CasesSummary, evaluate_cases

    for file, cases in questions.cases.items():
        scores = evaluate_cases(opened.engine, cases, batch_size=args.batch_size)
        summary = CasesSummary.of(scores)
        results.cases.append({"file": file, **who, **asdict(summary), "worth": summary.worth})
        results.case_scores += [{"file": file, **who, **score.row()} for score in scores]


def ask_tasks(
    who: Row,
    subject: Subject,
    opened: Opened,
    questions: Questions,
    args: argparse.Namespace,
    results: Results,
) -> None:
    """Add the scores of our own tasks, at each number of shots."""
    from tinylm.eval.task_scores import evaluate_task

    settings: Row = {"template": opened.template, "batch_size": args.batch_size, "seed": args.seed}
    for task, data in questions.tasks:
        for n in questions.shots:
            score = evaluate_task(
                opened.engine, task, data.examples, shots=data.shots[:n], **settings
            )
            say_what_was_lost(score)
            results.measures += measure_rows(who, score)
            results.answers[answers_file(subject, score)] = score.failed


def ask_best_of(
    who: Row,
    subject: Subject,
    opened: Opened,
    questions: Questions,
    args: argparse.Namespace,
    results: Results,
) -> None:
    """Add what each way of choosing among several answers gives."""
    from tinylm.eval.best_of_n import best_of_n

    if questions.judge is None:
        return
    for task, data in questions.tasks:
        score = best_of_n(
            opened.engine,
            questions.judge,
            task,
            data.examples,
            args.best_of,
            template=opened.template,
            seed=args.seed,
        )
        if score.n_errors:
            say(
                f"{task.name}: {score.n_errors} of {score.n_examples} questions could not be asked and count as wrong"
            )
        of = {"task": task.name, "n": score.n_samples, **who, "n_examples": score.n_examples}
        results.best_of += [
            {**of, "choice": name, **asdict(measure)} for name, measure in score.measures.items()
        ]
        results.answers[f"best-of-{name_in_file(subject)}-{task.name}.jsonl"] = score.drawn


def ask_harness(
    who: Row, opened: Opened, questions: Questions, args: argparse.Namespace, results: Results
) -> None:
    """Add the scores of the harness's tasks; without --shots each has as many as it says."""
    from tinylm.eval.lm_eval import run_harness

    settings: Row = {
        "include_path": args.include_path,
        "limit": args.limit,
        "batch_size": args.batch_size,
    }
    for shots in questions.shots if args.shots else (None,):
        scores = run_harness(opened.engine, questions.harness, shots=shots, **settings)
        results.measures += [harness_row(who, shots, score) for score in scores]


def say_what_was_lost(score: "TaskScore") -> None:
    """Tell of prompts that were cut and of questions that could not be asked."""
    where = f"{score.task}, {score.shots} shots"
    if score.n_truncated:
        say(
            f"{where}: {score.n_truncated} of {score.n_examples} prompts are longer than the context and lost their beginning"
        )
    if score.n_errors:
        say(
            f"{where}: {score.n_errors} of {score.n_examples} questions could not be asked and count as wrong: {score.failed[0].error}"
        )


def measure_rows(who: Row, score: "TaskScore") -> list[Row]:
    """One row for each measure of a task."""
    what = {"task": score.task, "shots": score.shots}
    return [
        {
            **what,
            "measure": name,
            **who,
            **asdict(measure),
            "chance": score.chance.get(name),
            "n_examples": score.n_examples,
            "worth": round(measure.value, 4),
        }
        for name, measure in score.measures.items()
    ]


def harness_row(who: Row, shots: int | None, found: "HarnessScore") -> Row:
    """The row of a measure of the harness; None shots: as its task says."""
    low, high = found.interval
    what = {"task": found.task, "shots": shots, "measure": found.measure}
    return {
        **what,
        **who,
        "value": found.value,
        "low": low,
        "high": high,
        "chance": None,
        "n_examples": found.n_examples,
        "worth": found.worth,
    }


def answers_file(subject: Subject, score: "TaskScore") -> str:
    """The name of the file for the answers that are not right."""
    return f"failed-{name_in_file(subject)}-{score.task}-{score.shots}shots.jsonl"


def name_in_file(subject: Subject) -> str:
    """The checkpoint as part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", str(subject.paths[0].with_suffix(""))).strip("_.")


# --- ranking and showing ----------------------------------------------------------------------------------------------


def rank(results: Results) -> None:
    """Sort the rows of each table, the best first, and give each its place; what ties shares one."""
    results.cases = ranked(results.cases, lambda row: (row["file"],))
    results.measures = ranked(
        results.measures, lambda row: (row["task"], str(row["shots"]), row["measure"])
    )


def ranked(rows: Iterable[Row], kind: Callable[[Row], tuple[str, ...]]) -> list[Row]:
    """The rows of each kind with their `worth` turned into a place among them."""
    from tinylm.eval.task_scores import format_ranks

    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(kind(row), []).append(row)
    found = []
    for group in groups.values():
        group.sort(key=lambda row: row["worth"], reverse=True)
        found += [
            {"place": place, **row}
            for place, row in zip(format_ranks([row["worth"] for row in group]), group, strict=True)
        ]
    return [{name: value for name, value in row.items() if name != "worth"} for row in found]


def show(results: Results) -> None:
    """Print the tables, and below them what failed."""
    if results.cases:
        table(
            ("place", "checkpoint", "step", "val_loss", "log_prob", "first_rank", "greedy", "failed", "prompt_ppl", "cases"),
            [
                (row["place"], row["checkpoint"], row["step"], row["val_loss"], row["log_prob"], rank_text(row["first_rank"]),
                 f"{row['n_greedy']}/{row['n_cases']}", row["n_failed"], row["prompt_perplexity"], row["file"])
                for row in results.cases
            ],
        )  # fmt: skip
    if results.cases and results.measures:
        print()
    if results.measures:
        table(
            ("task", "shots", "measure", "place", "checkpoint", "step", "val_loss", "value", "95% interval", "chance", "examples"),
            [
                (row["task"], row["shots"], row["measure"], row["place"], row["checkpoint"], row["step"], row["val_loss"], row["value"],
                 None if row["low"] is None else f"{row['low']:.4f} to {row['high']:.4f}", row["chance"], row["n_examples"])
                for row in results.measures
            ],
        )  # fmt: skip
    if results.best_of:
        if results.cases or results.measures:
            print()
        names = ("task", "n", "choice", "checkpoint", "step")
        table(
            (*names, "right", "95% interval", "examples"),
            [
                (
                    *(row[name] for name in names),
                    row["value"],
                    f"{row['low']:.4f} to {row['high']:.4f}",
                    row["n_examples"],
                )
                for row in results.best_of
            ],
        )
    for row in results.failed:
        print(f"{row['checkpoint']}  FAILED: {printable(row['error'])}")


def rank_text(rank: float | None) -> str | None:
    """A median of ranks, which are whole numbers: 3 or 2.5."""
    return None if rank is None else f"{rank:g}"


def table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print one table; a name is to the left, a number to the right."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        shown.add_column(
            name,
            justify="left"
            if name in ("place", "checkpoint", "task", "measure", "cases", "choice")
            else "right",
            no_wrap=True,
        )
    for row in rows:
        shown.add_row(*map(number, row))
    # Into a pipe nothing is cut: a program or a person with a wide screen reads it.
    Console(width=None if sys.stdout.isatty() else 400, markup=False, highlight=False).print(shown)


def number(value: Any) -> str:
    """A value for people: four digits behind the point, a dash for none."""
    return (
        "-" if value is None else f"{value:.4f}" if isinstance(value, float) else printable(value)
    )


def write(results: Results, folder: Path) -> None:
    """Write results.json, a .csv for each table, and the answers that are not right."""
    tables = {
        "cases": results.cases, "case_scores": results.case_scores, "measures": results.measures, "best_of": results.best_of, "failed": results.failed,
    }  # fmt: skip
    with writing(folder, "--out"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(tables, indent=2) + "\n", encoding="utf-8")
        for name, rows in tables.items():
            (folder / f"{name}.csv").unlink(missing_ok=True)  # of an evaluation before this one
            if rows:
                with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
                    lines = csv.DictWriter(file, list(rows[0]))
                    lines.writeheader()
                    lines.writerows(rows)
        for name, answers in results.answers.items():
            lines_of = (json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
            (folder / name).write_text("".join(lines_of), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
