"""Rows as text: each token once, targets apart from the rest, borders where the document changes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm.rows.inspect import RowToken, join_tokens, render_row, row_tokens
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


def test_the_last_target_of_a_row_is_rendered_though_it_is_not_an_input():
    """Tokens 0 to 4 of a stream: only 0 is not a target here (it is one of the previous row)."""
    assert plain(ids("abcd"), ids("bcde")) == "⟦a⟧bcde"


def test_a_prompt_is_in_brackets_and_its_answer_is_not():
    """Fine-tuning: the label of the last token of the prompt is the first of the answer."""
    labels = [IGNORE_INDEX, IGNORE_INDEX, *ids("xy"), EOS, IGNORE_INDEX]
    assert plain([*ids("P:Axy"[:2] + ">"), *ids("xy"), EOS], labels) == "⟦P:>⟧xy┊<|eos|>"


def test_padding_is_rendered_as_one_token():
    """Four pad tokens that are not targets; a pad token that is a target is a token like others."""
    assert (
        plain([*ids("ab"), PAD, PAD, PAD, PAD], [*ids("b"), *[IGNORE_INDEX] * 5])
        == "⟦a⟧b⟦<|pad|> x4⟧"
    )
    assert (
        plain([*ids("ab"), PAD, PAD], [*ids("b"), PAD, IGNORE_INDEX, IGNORE_INDEX])
        == "⟦a⟧b<|pad|>⟦<|pad|> x1⟧"
    )
    assert plain([PAD, PAD], [IGNORE_INDEX] * 2) == "⟦<|pad|><|pad|> x1⟧"


def test_a_document_mask_numbers_documents_and_padding():
    assert (
        plain(
            [*ids("a"), EOS, *ids("b"), PAD],
            [EOS, *ids("b"), IGNORE_INDEX, IGNORE_INDEX],
            [0, 1, 1, 2],
        )
        == "┃0┃⟦a⟧┃1┃<|eos|>b┃2┃⟦<|pad|> x1⟧"
    )


def test_a_label_that_is_not_the_next_input_follows_its_own_input():
    """A fine-tuning row may have one at the border of two examples: every trained label is rendered."""
    assert plain(ids("abcd"), [ord("b"), ord("X"), ord("d"), IGNORE_INDEX]) == "⟦a⟧bX⟦c⟧d"


def test_a_token_is_rendered_on_one_line_and_cannot_move_the_cursor():
    assert plain(ids("a\n\x1b"), [*ids("\n\x1b"), ord("é".encode()[:1])]) == r"⟦a⟧\n\x1b\xc3"


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.sampled_from([97, 98, EOS, PAD]), st.booleans()), min_size=1, max_size=12)
)
def test_every_token_is_rendered_once_and_every_target_is_marked(row):
    """Labels are the inputs shifted by one, some of them not trained; there are as many targets as
    trained labels."""
    tokens = [token for token, _ in row] + [97]
    labels = [
        token if trained else IGNORE_INDEX
        for token, (_, trained) in zip(tokens[1:], row, strict=True)
    ]
    tokens = row_tokens(BYTES, tokens[:-1], labels)
    assert sum(token.target for token in tokens) == sum(label != IGNORE_INDEX for label in labels)
    length = sum(
        int(token.text.rpartition(" x")[2]) if " x" in token.text else 1 for token in tokens
    )
    assert length == len(row) + (labels[-1] != IGNORE_INDEX)


def test_joined_tokens_keep_documents_and_targets_apart():
    tokens = [
        RowToken("a", 0, False),
        RowToken("b", 0, True),
        RowToken("c", 0, True),
        RowToken("d", 1, True),
    ]
    assert join_tokens(tokens) == [
        RowToken("a", 0, False),
        RowToken("bc", 0, True),
        RowToken("d", 1, True),
    ]
