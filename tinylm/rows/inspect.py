"""Rows of training as text: which tokens are targets, and where documents meet.

    ⟦### Instruction: 2+2?⟧ 4┊<|eos|>...    ⟦ ⟧ not trained   ┊ documents meet   ┃2┃ attention stops

Knows nothing of colors or consoles: training/show_rows.py prints.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.packing import IGNORE_INDEX

# Where documents meet: attention stops there, or continues.
WALL, SEAM = "┃", "┊"
# Around tokens that are not targets: characters that hardly occur in text.
OPEN, CLOSE = "⟦", "⟧"


@dataclass(frozen=True)
class InspectedRow:
    """A row to print."""

    heading: str
    """its place in the run and its source"""
    input_ids: list[int]
    labels: list[int]
    document_ids: list[int] | None


class RowToken(NamedTuple):
    """A token, several joined ones, or the padding of a row, as text."""

    text: str
    document: int
    """counted from the start of the row, or the number in the document mask"""
    target: bool
    """whether it is a target of the loss"""


def row_tokens(
    tokenizer: Tokenizer,
    input_ids: Sequence[int],
    labels: Sequence[int],
    document_ids: Sequence[int] | None = None,
) -> list[RowToken]:
    """The tokens of a row in order, with the last target, which is not an input;
    padding is one token.

    An input is a target if the label before it is that token; the first input never is. A label
    that the next input does not repeat follows its own input.

    Args:
        tokenizer: decodes the ids.
        input_ids: (T,) what the model sees.
        labels: (T,) the targets, IGNORE_INDEX where nothing is trained.
        document_ids: (T,) the document of each input, if attention stops between documents.

    >>> from tinylm.tokenizer.byte_char import ByteTokenizer
    >>> [token.text for token in row_tokens(ByteTokenizer(), [97, 98, 256, 256], [98, -100, -100, -100])]
    ['a', 'b', '<|pad|> x2']
    """
    end = _end_of_text(tokenizer, input_ids, labels)
    tokens: list[RowToken] = []
    document = 0
    for t in range(end):
        if document_ids is not None:
            document = document_ids[t]
        elif input_ids[t] == tokenizer.eos_id:
            document += 1  # EOS opens the next document, as in tokens/packing.py
        is_target = t > 0 and labels[t - 1] == input_ids[t]
        tokens.append(RowToken(tokenizer.token_text(input_ids[t]), document, is_target))
        is_repeated = t + 1 < len(input_ids) and labels[t] == input_ids[t + 1]
        if labels[t] != IGNORE_INDEX and not is_repeated:
            tokens.append(RowToken(tokenizer.token_text(labels[t]), document, True))
    if end < len(input_ids):
        text = f"{tokenizer.token_text(input_ids[-1])} x{len(input_ids) - end}"
        last = tokens[-1].document if document_ids is None else document_ids[-1]
        tokens.append(RowToken(text, last, False))
    return tokens


def _end_of_text(tokenizer: Tokenizer, input_ids: Sequence[int], labels: Sequence[int]) -> int:
    """Where the padding at the end of a row begins:
    pad tokens that are not targets and have none.
    """
    end = len(input_ids)
    while (
        end > 1
        and input_ids[end - 1] == tokenizer.pad_id
        and labels[end - 1] == labels[end - 2] == IGNORE_INDEX
    ):
        end -= 1
    return end


def join_tokens(tokens: Sequence[RowToken]) -> list[RowToken]:
    """Consecutive tokens of one document that are all targets, or all not, as one."""
    joined = []
    for key, group in groupby(tokens, key=lambda token: (token.document, token.target)):
        joined.append(RowToken("".join(token.text for token in group), *key))
    return joined


def render_row(tokens: Sequence[RowToken], *, masked: bool) -> str:
    """A row without colors: brackets around what is not a target, and a mark where documents meet.

    >>> from tinylm.tokenizer.byte_char import ByteTokenizer
    >>> ids, labels = [97, 98, 258, 99], [98, 258, 99, -100]
    >>> render_row(row_tokens(ByteTokenizer(), ids, labels), masked=False)
    '⟦a⟧b┊<|eos|>c'
    >>> render_row(row_tokens(ByteTokenizer(), ids, labels, [0, 0, 1, 1]), masked=True)
    '┃0┃⟦a⟧b┃1┃<|eos|>c'
    """
    text = ""
    for border, token in with_borders(tokens, masked=masked):
        text += border + (token.text if token.target else f"{OPEN}{token.text}{CLOSE}")
    return text


def with_borders(tokens: Sequence[RowToken], *, masked: bool) -> list[tuple[str, RowToken]]:
    """The joined tokens of a row, each after the mark of a new document, or after ""."""
    marked = []
    previous = None if masked else tokens[0].document
    for token in join_tokens(tokens):
        mark = f"{WALL}{token.document}{WALL}" if masked else SEAM
        marked.append(("" if token.document == previous else mark, token))
        previous = token.document
    return marked
