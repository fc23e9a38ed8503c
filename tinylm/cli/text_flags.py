"""The flags of `tokenizer` and `encode` for the text to read, and the source that they mean."""

import argparse
import os
from typing import TYPE_CHECKING

from tinylm.common.errors import UserError

if TYPE_CHECKING:
    from tinylm.text.named_sources import Together

# The flag in place of the setting that an error names (`calling`).
TEXT_FLAGS = {
    "data.dataset": "--data",
    "data.text_field": "--text-field",
    "data.dataset_config": "the configuration",
    "data.split": "the split in --data",
}


def add_text_flags(parser: argparse.ArgumentParser, *, separator: str) -> None:
    """Declare the flags; `separator` is the help of --separator."""
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, folders or globs of .txt, .md, .html, .jsonl, .json, .csv, .tsv, .parquet, "
        "also compressed; "
        "or hf:owner/name[:config[:split]], streamed from the hub",
    )
    parser.add_argument("--docs", type=int, metavar="N", help="stop after N documents")
    parser.add_argument(
        "--text-field",
        default="text",
        metavar="KEY",
        help="column or key that holds the text (default: text)",
    )
    parser.add_argument("--separator", metavar="TEXT", help=separator)


def add_tokenizer_flag(parser: argparse.ArgumentParser) -> None:
    """Declare --tokenizer, which the command needs."""
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="TOKENIZER",
        help="a folder, a Hugging Face name such as gpt2, or byte",
    )


def add_processes_flag(parser: argparse.ArgumentParser, what: str) -> None:
    """Declare --processes; `what` begins its help."""
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help=f"{what} (default: one per core)",
    )


def text_source(arguments: argparse.Namespace, *, again: str = "Try again.") -> "Together":
    """The text that the flags mean; `again` is the fix in the error of a network failure."""
    from tinylm.text.named_sources import sources_named

    require_positive(arguments, "docs")
    if arguments.separator == "":
        raise UserError("--separator", "is empty", "Give the text that separates documents")
    paths = [os.path.expanduser(path) for path in arguments.data]
    return sources_named(paths, arguments.text_field, arguments.separator, again=again)


def require_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Raise a UserError for a flag whose number is less than 1."""
    for name in names:
        value = vars(arguments)[name]
        if value is not None and value < 1:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(flag, f"must be at least 1, got {value}", "Give a whole number from 1")
