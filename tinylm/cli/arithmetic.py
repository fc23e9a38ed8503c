"""`python -m tinylm arithmetic`: the data of configs/recipes/arithmetic."""

import argparse
import logging
from pathlib import Path

from tinylm.common.errors import printable
from tinylm.text.arithmetic import SIZES, write_arithmetic

logger = logging.getLogger(__name__)

SUMMARY = "write sums and word problems, for a small model to learn"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.usage = "python -m tinylm arithmetic [--out data/arithmetic] [--seed 0]"
    parser.description = (
        "Write texts, answered questions, questions with known results, and two files of held-out "
        "questions: no pair of numbers and no wording of theirs is in the other files."
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("data/arithmetic"),
        metavar="FOLDER",
        help="folder of the six files (data/arithmetic)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="other rows (0)")


def run(arguments: argparse.Namespace) -> int:
    """Write the files and print the path of the folder."""
    write_arithmetic(arguments.out, seed=arguments.seed)
    for name, size in SIZES.items():
        logger.info("%s.jsonl: %s rows", name, f"{size:,}")
    print(printable(arguments.out))
    return 0
