"""Rows as text: each token once, targets told from the rest, borders where the document changes."""

from hypothesis import given
from hypothesis import strategies as st

from tinylm.rows.inspect import RowToken, render_row, row_tokens, runs
from tinylm.tokenizer.byte_char import ByteTokenizer
from tinylm.tokens.packing import IGNORE_INDEX

BYTES = ByteTokenizer()
PAD, EOS = BYTES.pad_id, BYTES.eos_id


def ids(text: str) -> list[int]:
    return list(text.encode())


def plain(input_ids: list[int], labels: list[int], document_ids: list[int] | None = None) -> str:
    return render_row(
        row_tokens(BYTES, input_ids, labels, document_ids), masked=document_ids is not None
    )


def test_the_last_target_of_a_row_is_shown_though_it_is_no_input():
    """Tokens 0 to 4 of a stream: 0 is the only one that is not asked for here (the row before asked for it)."""
    assert plain(ids("abcd"), ids("bcde")) == "⟦a⟧bcde"


def test_a_prompt_is_told_from_its_answer():
    """Fine-tuning: the label of the last token of the prompt is the first of the answer."""
    labels = [IGNORE_INDEX, IGNORE_INDEX, *ids("xy"), EOS, IGNORE_INDEX]
    assert plain([*ids("P:Axy"[:2] + ">"), *ids("xy"), EOS], labels) == "⟦P:>⟧xy┊<|eos|>"


def test_padding_is_one_piece():
    """Four pad tokens that nobody asks for; a pad token that is a target is a token like others."""
    assert (
        plain([*ids("ab"), PAD, PAD, PAD, PAD], [*ids("b"), *[IGNORE_INDEX] * 5])
        == "⟦a⟧b⟦<|pad|> x4⟧"
    )
    assert (
        plain([*ids("ab"), PAD, PAD], [*ids("b"), PAD, IGNORE_INDEX, IGNORE_INDEX])
        == "⟦a⟧b<|pad|>⟦<|pad|> x1⟧"
    )
    assert plain([PAD, PAD], [IGNORE_INDEX] * 2) == "⟦<|pad|><|pad|> x1⟧"


def test_a_mask_numbers_its_documents_also_those_of_padding():
    assert (
        plain(
            [*ids("a"), EOS, *ids("b"), PAD],
            [EOS, *ids("b"), IGNORE_INDEX, IGNORE_INDEX],
            [0, 1, 1, 2],
        )
        == "┃0┃⟦a⟧┃1┃<|eos|>b┃2┃⟦<|pad|> x1⟧"
    )


def test_a_label_that_is_not_the_next_input_stands_behind_its_own():
    """Which a fine-tuning row may have at the border of two examples: nothing that is trained goes unseen."""
    assert plain(ids("abcd"), [ord("b"), ord("X"), ord("d"), IGNORE_INDEX]) == "⟦a⟧bX⟦c⟧d"


def test_a_token_is_shown_on_one_line_and_cannot_move_the_cursor():
    assert plain(ids("a\n\x1b"), [*ids("\n\x1b"), ord("é".encode()[:1])]) == r"⟦a⟧\n\x1b\xc3"


@given(
    st.lists(st.tuples(st.sampled_from([97, 98, EOS, PAD]), st.booleans()), min_size=1, max_size=12)
)
def test_every_token_is_shown_once_and_every_target_is_marked(row):
    """Labels are the inputs one place on, some of them not trained; the count of targets is that of trained labels."""
    tokens = [token for token, _ in row] + [97]
    labels = [
        token if trained else IGNORE_INDEX
        for token, (_, trained) in zip(tokens[1:], row, strict=True)
    ]
    pieces = row_tokens(BYTES, tokens[:-1], labels)
    assert sum(piece.target for piece in pieces) == sum(label != IGNORE_INDEX for label in labels)
    length = sum(
        int(piece.text.rpartition(" x")[2]) if " x" in piece.text else 1 for piece in pieces
    )
    assert length == len(row) + (labels[-1] != IGNORE_INDEX)


def test_runs_keep_documents_and_targets_apart():
    pieces = [
        RowToken("a", 0, False),
        RowToken("b", 0, True),
        RowToken("c", 0, True),
        RowToken("d", 1, True),
    ]
    assert runs(pieces) == [
        RowToken("a", 0, False),
        RowToken("bc", 0, True),
        RowToken("d", 1, True),
    ]
