"""Rank checkpoints and Hugging Face models on cases with a known continuation, and on tasks.

    python evaluate_checkpoints.py --checkpoints 'checkpoints/*.ckpt' --cases cases/wiki_basics.yaml
    python evaluate_checkpoints.py --checkpoints 'checkpoints/*.ckpt' --tasks gsm8k,sst2 --shots 0,4
    python evaluate_checkpoints.py --model gpt2 --tasks sst2 --shots 0,4
    python evaluate_checkpoints.py --tasks gsm8k --best-of 8 --verifier checkpoints/verifier/final.ckpt

The tables go to stdout, everything else to stderr; numbers and failed answers to files in --out.
A checkpoint that cannot be read is listed below the tables.
"""

import argparse
import sys
from pathlib import Path

from tinylm.cli.evaluation_flags import add_models, add_questions
from tinylm.cli.model_flags import (
    BATCH_HELP,
    BATCH_SIZE,
    add_deterministic_flag,
    add_device_flag,
    add_weights_flags,
    positive,
)
from tinylm.cli.program import Parser, run_program


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
        "--batch-size",
        type=positive,
        default=BATCH_SIZE,
        metavar="N",
        help=BATCH_HELP,
    )
    add_device_flag(parser)
    add_deterministic_flag(parser)
    add_weights_flags(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results"),
        metavar="FOLDER",
        help="folder for the numbers and the failed answers (results)",
    )
    return parser.parse_args(argv)


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
