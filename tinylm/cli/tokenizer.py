"""`python -m tinylm tokenizer train | compare | show`: train a BPE tokenizer, compare, inspect."""

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from tinylm.cli.text_flags import (
    TEXT_FLAGS,
    add_processes_flag,
    add_text_flags,
    require_positive,
    text_source,
)
from tinylm.common.console import progress_bar
from tinylm.common.errors import UserError, printable, rename_settings
from tinylm.common.tables import Table, print_table, results_console

if TYPE_CHECKING:
    from tinylm.tokenizer.base import Tokenizer

logger = logging.getLogger(__name__)

SUMMARY = "train a tokenizer, compare several, show the tokens of a text"

# Flags in place of the settings that errors name (`calling`).
TRAIN_FLAGS = TEXT_FLAGS | {
    "tokenizer.vocab_size": "--vocab-size",
    "tokenizer.pattern": "--pattern",
    "special token": "--special",
}
TOKENIZER_FLAGS = {"tokenizer.path": "TOKENIZER"}

# Neighboring tokens differ; all five are readable on black and on white.
TOKEN_STYLES = (
    "black on bright_cyan",
    "black on bright_yellow",
    "black on bright_green",
    "black on bright_magenta",
    "black on white",
)

TOKENIZER_HELP = "a folder, a Hugging Face name such as gpt2, or byte"
SEPARATOR_HELP = "text between documents in a .txt file (default: the file is one document)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions `train`, `compare` and `show`."""
    parser.usage = "python -m tinylm tokenizer train|compare|show [flags]"
    parser.description = "Train a tokenizer, compare several, show the tokens of a text."
    actions = parser.add_subparsers(
        prog="python -m tinylm tokenizer", metavar="action", required=True
    )
    add_train(actions.add_parser("train", help="train byte-level BPE on text"))
    add_compare(actions.add_parser("compare", help="how well several tokenizers fit a text"))
    add_show(actions.add_parser("show", help="the tokens of a text"))


def add_train(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `tokenizer train`."""
    parser.usage = (
        "python -m tinylm tokenizer train --data 'corpus/*.txt' --out FOLDER --vocab-size N [flags]"
    )
    parser.description = (
        "Train byte-level BPE on text and write the files that transformers also opens."
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
for example:
  python -m tinylm tokenizer train --data 'corpus/*.txt' --out tokenizers/mine --processes 8 \\
    --vocab-size 32000 --special '<|endoftext|>' '<|pad|>'
"""
    add_text_flags(parser, separator=SEPARATOR_HELP)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="the new folder of the tokenizer"
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        required=True,
        metavar="N",
        help="number of tokens, with the 256 bytes and the special tokens",
    )
    parser.add_argument(
        "--special",
        nargs="+",
        default=["<|endoftext|>"],
        metavar="TOKEN",
        help="special tokens: text is split at them and no merge contains one; the end of text is "
        "a well-known one among them, else the first (default: <|endoftext|>)",
    )
    parser.add_argument(
        "--pattern",
        default="gpt2",
        metavar="NAME",
        help="the words that merges stay within: gpt2, gpt4, qwen2 or a regular expression "
        "(default: gpt2)",
    )
    add_processes_flag(parser, "processes that count words; the result is the same")
    parser.set_defaults(action=train)


def add_compare(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `tokenizer compare`."""
    parser.usage = "python -m tinylm tokenizer compare TOKENIZER ... --data PATH ... [flags]"
    parser.description = (
        "How well several tokenizers fit a text: bytes per token, the share of the vocabulary "
        "in use, the longest tokens found."
    )
    parser.add_argument("tokenizers", nargs="+", metavar="TOKENIZER", help=TOKENIZER_HELP)
    add_text_flags(parser, separator=SEPARATOR_HELP)
    parser.set_defaults(action=compare)


def add_show(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `tokenizer show`."""
    parser.usage = "python -m tinylm tokenizer show TOKENIZER 'Some text'"
    parser.description = "The tokens of a text, with their ids below."
    parser.add_argument("tokenizer", metavar="TOKENIZER", help=TOKENIZER_HELP)
    parser.add_argument("text", help="the text")
    parser.set_defaults(action=show)


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen action."""
    return arguments.action(arguments)


@rename_settings(TRAIN_FLAGS)
def train(arguments: argparse.Namespace) -> int:
    """Train a tokenizer, write its files, and print their folder."""
    from tinylm.common.files import require_writable
    from tinylm.text.chunks import word_chunks
    from tinylm.tokenizer.bpe_fast import learn_bpe
    from tinylm.tokenizer.bpe_files import check_request
    from tinylm.tokenizer.pretokenize import Pretokenizer

    require_positive(arguments, "processes")
    pretokenizer = Pretokenizer(arguments.pattern, tuple(arguments.special))
    check_request(arguments.vocab_size, pretokenizer)
    require_writable(arguments.out, "--out")
    source = text_source(arguments)
    with progress_bar() as on_progress:
        bpe = learn_bpe(
            word_chunks(source, arguments.processes, arguments.docs),
            arguments.vocab_size,
            pretokenizer,
            processes=arguments.processes,
            n_bytes=0 if arguments.docs else source.size(),
            on_progress=on_progress,
        )
    bpe.save(arguments.out, "--out")
    if bpe.vocab_size < arguments.vocab_size:
        logger.info(
            "vocabulary: %d tokens instead of %d: every word of this text is already one token",
            bpe.vocab_size,
            arguments.vocab_size,
        )
    logger.info(
        "learned %d merges; end of text %s, padding %s",
        len(bpe.merges),
        bpe.eos,
        bpe.pad or bpe.eos,
    )
    logger.info(
        "next: python -m tinylm tokenizer show %s 'Some text', or tokenizer.path=%s in a config",
        arguments.out,
        arguments.out,
    )
    print(printable(arguments.out))
    return 0


@rename_settings(TEXT_FLAGS)
def compare(arguments: argparse.Namespace) -> int:
    """Print a table with one row per tokenizer; the exit code is 2 if one could not be opened."""
    from rich.text import Text

    from tinylm.text.chunks import word_chunks
    from tinylm.tokenizer.fit import measure_fit

    source = text_source(arguments)
    numbers = ("vocabulary", "tokens", "bytes per token", "used")
    text = ("tokenizer", "longest tokens")
    rows = Table(("tokenizer", *numbers, "longest tokens"), text, fold=("longest tokens",))
    tokenizers, errors = open_tokenizers(arguments.tokenizers)
    for name, tokenizer in tokenizers.items():
        texts = (
            text for chunk in word_chunks(source, docs=arguments.docs) for text in chunk.texts()
        )
        fit = measure_fit(tokenizer, texts)
        if not fit.n_tokens:
            raise UserError(source.name, "contains no text", "Give a file with text")
        longest = "  ".join(f"'{tokenizer.token_text(id)}'" for id in fit.longest)
        rows.add_row(
            Text(printable(name)),
            f"{tokenizer.vocab_size:,}",
            f"{fit.n_tokens:,}",
            f"{fit.n_bytes / fit.n_tokens:.3f}",
            f"{fit.n_used:,} ({fit.n_used / tokenizer.vocab_size:.0%})",
            Text(longest),
        )
    if tokenizers:
        print(f"text: {printable(source.name)}")
        print_table(rows)
    for error in errors:
        logger.error("error: %s", error)
    return 2 if errors else 0


def open_tokenizers(names: list[str]) -> tuple[dict[str, "Tokenizer"], list[UserError]]:
    """The tokenizers that could be opened, by name, and the errors of the others."""
    from tinylm.tokenizer.factory import named_tokenizer

    tokenizers, errors = {}, []
    for name in names:
        try:
            with rename_settings(TOKENIZER_FLAGS):
                tokenizers[name] = named_tokenizer(name)
        except UserError as error:
            errors.append(error)
    return tokenizers, errors


@rename_settings(TOKENIZER_FLAGS)
def show(arguments: argparse.Namespace) -> int:
    """Print the tokens of a text separated by bars, their ids, and their number."""
    from rich.text import Text

    from tinylm.tokenizer.factory import named_tokenizer

    tokenizer = named_tokenizer(arguments.tokenizer)
    ids = tokenizer.encode(arguments.text)
    styles = [TOKEN_STYLES[position % len(TOKEN_STYLES)] for position in range(len(ids))]
    console = results_console()
    for divider, pieces in (("|", map(tokenizer.token_text, ids)), (" ", map(str, ids))):
        styled = (Text(piece, style) for piece, style in zip(pieces, styles, strict=True))
        console.print(Text(divider).join(styled), soft_wrap=True)
    n_bytes = len(arguments.text.encode())
    summary = f"{len(ids)} tokens, {n_bytes} bytes"
    if ids:
        summary += f", {n_bytes / len(ids):.2f} bytes per token"
    console.print(summary)
    return 0
