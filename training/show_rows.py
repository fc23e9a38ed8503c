"""Print the first rows of a run as training sees them: `--show-rows N` of train.py and finetune.py."""

import sys
from collections.abc import Iterable
from itertools import chain, islice

from rich.console import Console
from rich.text import Text

from data import RunData
from tinylm.common.console import say
from tinylm.common.errors import UserError
from tinylm.rows.inspect import (
    CLOSE,
    OPEN,
    SEAM,
    WALL,
    InspectedRow,
    RowToken,
    render_row,
    row_tokens,
    with_borders,
)
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.packing import IGNORE_INDEX

# Consecutive documents of a row get these colors in turn.
DOCUMENT_COLORS = ("default", "cyan", "yellow")


def show_rows(data: RunData, n_rows: int) -> None:
    """Print the first `n_rows` rows of a run on stdout, and no more than the run has.

    Args:
        data: a data module whose `prepare` was called.
        n_rows: at least 1.
    """
    if n_rows < 1:
        raise UserError(
            f"--show-rows: must be at least 1, got {n_rows}. Give the number of rows to print."
        )
    training = data.config.training
    in_run = training.max_steps * training.grad_accum_steps * training.micro_batch_size
    rows = islice(data.inspect_rows(), min(n_rows, in_run))
    labeled = "target" if data.config.verifier is None else "departure"
    print_rows(chain.from_iterable(rows), data.tokenizer, labeled)


def print_rows(rows: Iterable[InspectedRow], tokenizer: Tokenizer, labeled: str = "target") -> None:
    """Print rows on stdout, in color on a terminal that has it, with marks elsewhere; the legend goes to stderr.

    Args:
        rows: the rows, in order.
        tokenizer: decodes their tokens.
        labeled: what a label that is not IGNORE_INDEX marks.
    """
    console = Console(width=None if sys.stdout.isatty() else 400, highlight=False, markup=False)
    colored = console.is_terminal and not console.no_color
    legend = f"{OPEN}no {labeled}{CLOSE}"
    if colored:
        legend = f"dim: no {labeled}; another color: another document"
    say(f"{SEAM} documents meet, {WALL}2{WALL} attention stops and document 2 begins, {legend}")
    for row in rows:
        pieces = row_tokens(tokenizer, row.input_ids, row.labels, row.document_ids)
        masked = row.document_ids is not None
        text = (
            colored_row(pieces, masked=masked)
            if colored
            else Text(render_row(pieces, masked=masked))
        )
        n_labels = sum(label != IGNORE_INDEX for label in row.labels)
        n_documents = len({piece.document for piece in pieces})
        counts = f"{len(row.input_ids)} tokens, {labeled}s: {n_labels}, documents: {n_documents}\n"
        console.print(Text(row.heading, "bold"), soft_wrap=True)
        console.print(text, soft_wrap=True)
        console.print(counts, soft_wrap=True)


def colored_row(pieces: list[RowToken], *, masked: bool) -> Text:
    """A row with a color for each document, dim where a token is not a target."""
    text = Text()
    for border, piece in with_borders(pieces, masked=masked):
        color = DOCUMENT_COLORS[piece.document % len(DOCUMENT_COLORS)]
        text.append(border, "bold red")
        text.append(piece.text, color if piece.target else f"dim {color}")
    return text
