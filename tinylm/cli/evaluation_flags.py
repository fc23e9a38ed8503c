"""The flags of evaluate_checkpoints.py: what is evaluated, and on what."""

import argparse
from pathlib import Path

from tinylm.cli.model_flags import add_tokenizer_flag, positive

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
    "--verifier": "checkpoint of a verifier or a reward model (finetune.py)",
}


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
    add_tokenizer_flag(group)


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
