"""`python -m tinylm data stats`: lengths, languages and scripts of a corpus, and the seq_len it fits."""

import argparse
from typing import TYPE_CHECKING

from tinylm.cli.text_flags import (
    TEXT_FLAGS,
    add_processes_flag,
    add_text_flags,
    add_tokenizer_flag,
    require_positive,
    text_source,
)
from tinylm.common.console import progress_bar
from tinylm.common.errors import UserError, rename_settings
from tinylm.common.tables import Table, print_table

if TYPE_CHECKING:
    from tinylm.tokens.length_stats import Measures

SUMMARY = "lengths, languages and scripts of a corpus, and the seq_len it fits"
# Rows of the tables of scripts and languages.
MAX_LINES = 8
BAR_WIDTH = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.usage = "python -m tinylm data stats --data PATH ... --tokenizer TOKENIZER [flags]"
    parser.description = (
        "Count documents, characters and tokens, and show what each seq_len would cut or waste. "
        "--docs stops after the chunk with the N-th document."
    )
    add_text_flags(
        parser, separator="text between documents in a .txt file (default: each line is a document)"
    )
    add_tokenizer_flag(parser)
    add_processes_flag(parser, "number of processes")


@rename_settings({**TEXT_FLAGS, "tokenizer.path": "--tokenizer"})
def run(arguments: argparse.Namespace) -> int:
    """Measure the corpus and print the tables."""
    from tinylm.tokenizer.factory import named_tokenizer
    from tinylm.tokens.length_stats import measure_corpus

    require_positive(arguments, "processes")
    source = text_source(arguments)
    tokenizer = named_tokenizer(arguments.tokenizer)
    with progress_bar() as on_progress:
        measured = measure_corpus(
            source,
            tokenizer,
            docs=arguments.docs,
            processes=arguments.processes,
            on_progress=on_progress,
        )
    if not len(measured.lengths):
        raise UserError(("--data", source.name), "has no documents", "Give files with text")
    show_counts(measured)
    show_lengths(measured)
    show_fits(measured)
    return 0


def show_counts(measured: "Measures") -> None:
    """Print the totals, and the most frequent languages and scripts."""
    from tinylm.text.scripts import scripts_of

    n_characters = measured.characters.total()
    n_tokens = int(measured.lengths.sum(dtype="int64"))
    n_text_tokens = max(n_tokens - len(measured.lengths), 1)  # without EOS
    print(
        f"{len(measured.lengths):,} documents, {n_characters:,} characters, {n_tokens:,} tokens "
        f"with one EOS each, {measured.n_bytes / n_text_tokens:.2f} bytes per token"
    )
    scripts = scripts_of(measured.characters)
    print(f"characters: {shares(scripts.most_common(MAX_LINES), n_characters)}")
    languages = measured.languages.most_common(MAX_LINES)
    print(f"languages, guessed: {shares(languages, len(measured.lengths))}")


def shares(counts: list[tuple[str, int]], total: int) -> str:
    """`Latin 80.1%, spaces 15.2%`."""
    return ", ".join(f"{name} {count / max(total, 1):.1%}" for name, count in counts)


def show_lengths(measured: "Measures") -> None:
    """Print the histogram and the quantiles of lengths."""
    import numpy as np

    from tinylm.tokens.length_stats import histogram

    bins = histogram(measured.lengths)
    most = max(count for _, count, _ in bins)
    total = int(measured.lengths.sum(dtype="int64"))
    table = Table(("tokens, at most", "documents", "of all tokens", ""), text=("",))
    for longest, count, n_tokens in bins:
        bar = "#" * max(round(BAR_WIDTH * count / most), 1)
        table.add_row(f"{longest:,}", f"{count:,}", f"{n_tokens / total:.1%}", bar)
    print_table(table)
    places = (50, 90, 95, 99, 100)
    found = np.percentile(measured.lengths, places, method="inverted_cdf").tolist()
    quantiles = ", ".join(f"{place}%: {int(n):,}" for place, n in zip(places, found, strict=True))
    print(f"length of a document in tokens, {quantiles}")


def show_fits(measured: "Measures") -> None:
    """Print what each seq_len does, and the one to begin with."""
    from tinylm.tokens.length_stats import RECOMMENDED_SHARE, fits, recommended

    columns = ("seq_len", "documents whole", "tokens cut", "padding, one document a row")
    table = Table(columns)
    for fit in fits(measured.lengths):
        table.add_row(
            f"{fit.seq_len:,}", f"{fit.whole:.1%}", f"{fit.cut:.1%}", f"{fit.padding:.1%}"
        )
    print_table(table)
    print(
        f"recommended training.seq_len: {recommended(measured.lengths)}, the smallest that takes "
        f"{RECOMMENDED_SHARE:.0%} of the documents whole. Packed rows, as in train.py, have no padding "
        "and lose nothing: what is cut continues in the next row."
    )
