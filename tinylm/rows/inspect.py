"""Rows of training as text: which tokens are targets, and where documents meet. Knows nothing of colours or consoles."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.packing import IGNORE_INDEX

# Where documents meet: attention stops there, or goes on.
WALL, SEAM = "┃", "┊"
# Around tokens that are no targets: characters that text hardly has.
OPEN, CLOSE = "⟦", "⟧"


class RowToken(NamedTuple):
    """A token, or some padding, as people see it."""

    text: str
    document: int
    """counted from the start of the row; with a document mask, the number that the mask has"""
    target: bool
    """whether the model is asked for it"""


def row_tokens(
    tokenizer: Tokenizer,
    input_ids: Sequence[int],
    labels: Sequence[int],
    document_ids: Sequence[int] | None = None,
) -> list[RowToken]:
    """The tokens of a row in their order, among them the last target, which is no input.

    An input is a target where the label before it is trained; the first one never is. A trained label that the next
    input does not repeat stands behind its own input. Padding is one piece.

    Args:
        tokenizer: what the ids are of.
        input_ids: (T,) what the model sees.
        labels: (T,) what it is asked for, IGNORE_INDEX where nothing is trained.
        document_ids: (T,) the document of each input, where attention stops between them.

    >>> from tinylm.tokenizer.byte_char import ByteTokenizer
    >>> [piece.text for piece in row_pieces(ByteTokenizer(), [97, 98, 256, 256], [98, -100, -100, -100])]
    ['a', 'b', '<|pad|> x2']
    """
    end = _end_of_text(tokenizer, input_ids, labels)
    pieces: list[RowToken] = []
    document = 0
    for place in range(end):
        # Without a mask a document ends with EOS, which the next one is opened by, as in packing.document_ids.
        document = (
            document + (input_ids[place] == tokenizer.eos_id)
            if document_ids is None
            else document_ids[place]
        )
        asked = place > 0 and labels[place - 1] == input_ids[place]
        pieces.append(RowToken(tokenizer.token_text(input_ids[place]), document, asked))
        if labels[place] != IGNORE_INDEX and (
            place + 1 == len(input_ids) or labels[place] != input_ids[place + 1]
        ):
            pieces.append(RowToken(tokenizer.token_text(labels[place]), document, True))
    if end < len(input_ids):
        padding = f"{tokenizer.token_text(input_ids[-1])} x{len(input_ids) - end}"
        pieces.append(
            RowToken(
                padding, pieces[-1].document if document_ids is None else document_ids[-1], False
            )
        )
    return pieces


def _end_of_text(tokenizer: Tokenizer, input_ids: Sequence[int], labels: Sequence[int]) -> int:
    """Where the padding at the end of a row begins: pad tokens that no label asks for, and that ask for nothing."""
    end = len(input_ids)
    while (
        end > 1
        and input_ids[end - 1] == tokenizer.pad_id
        and labels[end - 1] == labels[end - 2] == IGNORE_INDEX
    ):
        end -= 1
    return end


def runs(pieces: Iterable[RowToken]) -> list[RowToken]:
    """Neighbours of one document that are all targets, or all not, as one piece each."""
    return [
        RowToken("".join(piece.text for piece in run), *kind)
        for kind, run in groupby(pieces, key=lambda piece: (piece.document, piece.target))
    ]


def render_row(pieces: Sequence[RowToken], *, masked: bool) -> str:
    """A row without colours: what is no target in brackets, and a mark where documents meet, with the new one's number behind a wall.

    >>> from tinylm.tokenizer.byte_char import ByteTokenizer
    >>> ids, labels = [97, 98, 258, 99], [98, 258, 99, -100]
    >>> plain_row(row_pieces(ByteTokenizer(), ids, labels), masked=False)
    '⟦a⟧b┊<|eos|>c'
    >>> plain_row(row_pieces(ByteTokenizer(), ids, labels, [0, 0, 1, 1]), masked=True)
    '┃0┃⟦a⟧b┃1┃<|eos|>c'
    """
    return "".join(
        f"{border}{piece.text if piece.target else f'{OPEN}{piece.text}{CLOSE}'}"
        for border, piece in with_borders(pieces, masked=masked)
    )


def with_borders(pieces: Sequence[RowToken], *, masked: bool) -> list[tuple[str, RowToken]]:
    """The runs of a row, each with the mark of the border before it, or with nothing."""
    marked, before = [], None if masked else pieces[0].document
    for piece in runs(pieces):
        mark = f"{WALL}{piece.document}{WALL}" if masked else SEAM
        marked.append(("" if piece.document == before else mark, piece))
        before = piece.document
    return marked


@dataclass(frozen=True)
class InspectedRow:
    """A row to print."""

    heading: str
    """its place in the run and its source"""
    input_ids: list[int]
    labels: list[int]
    document_ids: list[int] | None
