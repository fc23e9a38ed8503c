"""Rank checkpoints and Hugging Face models on cases with a known continuation, and on tasks.

    python evaluate_checkpoints.py --checkpoints 'checkpoints/*.ckpt' --cases cases/wiki_basics.yaml
    python evaluate_checkpoints.py --checkpoints 'checkpoints/*.ckpt' --tasks gsm8k,sst2 --shots 0,4
    python evaluate_checkpoints.py --model gpt2 --tasks sst2 --shots 0,4
    python evaluate_checkpoints.py --tasks gsm8k --best-of 8 --verifier checkpoints/verifier/best.ckpt

The tables go to stdout, everything else to stderr; numbers and failed answers to files in --out.
A checkpoint that cannot be read is listed below the tables.
"""

import argparse
import sys
from pathlib import Path

from tinylm.cli.program import Parser, run_program
from tinylm.common.device import NAMES

QUESTION_HELP = {
    "--cases": "YAML files of cases: name, prompt, target",
    "--tasks": "sst2, samsum, gsm8k, sms, alpaca, or pairs (your own rows)",
    "--shots": "solved examples before each question (0; for --lm-eval as in its tasks)",
    "--data": "rows of a task: a file, or a folder with train and test",
    "--smoke": "a dozen built-in rows per task, to try it without data",
    "--limit": "at most N examples per task, sampled with --seed",
    "--seed": "seed of the sampled examples and of the bootstrap (0)",
    "--lm-eval": "tasks of the lm-evaluation-harness (pip install lm_eval)",
    "--include-path": "YAML tasks for --lm-eval, in place of its own",
    "--best-of": "draw N answers per question, choose one at random, by vote, by --verifier",
    "--verifier": "checkpoint of a verifier (finetune.py --config configs/verifier.yaml)",
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python evaluate_checkpoints.py",
        usage="python evaluate_checkpoints.py --checkpoints 'checkpoints/*.ckpt' "
        "--cases cases/wiki_basics.yaml",
        description="Rank checkpoints and Hugging Face models on cases and tasks.",
    )
    add_models(parser.add_argument_group("models"))
    add_questions(parser.add_argument_group("cases and tasks"))
    parser.add_argument(
        "--batch-size", type=positive, default=16, metavar="N", help="texts scored together (16)"
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


def add_models(group: argparse._ArgumentGroup) -> None:
    """Declare the flags that name what is evaluated."""
    group.add_argument(
        "--checkpoints",
        nargs="+",
        metavar="PATTERN",
        help="files or globs (checkpoints/*.ckpt if no --model is given)",
    )
    group.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help="a Hugging Face name or folder, prompted in plain text as a baseline; "
        "may be given several times",
    )
    group.add_argument(
        "--tokenizer",
        default="auto",
        metavar="NAME",
        help="auto: the one in the checkpoint; else byte, or a Hugging Face name or folder",
    )


def add_questions(group: argparse._ArgumentGroup) -> None:
    """Declare the flags that say what the models are asked."""
    settings = {
        "--cases": {"nargs": "+", "type": Path, "default": [], "metavar": "FILE"},
        "--tasks": {"type": words, "default": (), "metavar": "NAME,..."},
        "--shots": {"type": words, "metavar": "N,..."},
        "--data": {"action": "append", "default": [], "metavar": "NAME=PATH"},
        "--smoke": {"action": "store_true"},
        "--limit": {"type": positive, "metavar": "N"},
        "--seed": {"type": int, "default": 0, "metavar": "N"},
        "--lm-eval": {"type": words, "default": (), "metavar": "NAME,..."},
        "--include-path": {"type": Path, "metavar": "FOLDER"},
        "--best-of": {"type": positive, "metavar": "N"},
        "--verifier": {"type": Path, "metavar": "FILE"},
    }
    for flag, text in QUESTION_HELP.items():
        group.add_argument(flag, help=text, **settings[flag])


def words(text: str) -> tuple[str, ...]:
    """The parts of a list with commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def positive(text: str) -> int:
    """A whole number from 1."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    arguments = parse(argv)
    return run_program(lambda: run(arguments), debug=arguments.debug)


def run(arguments: argparse.Namespace) -> int:
    """Import what evaluation needs, after --help, and evaluate."""
    from tinylm.cli.evaluate import evaluate

    return evaluate(arguments)


if __name__ == "__main__":
    sys.exit(main())
