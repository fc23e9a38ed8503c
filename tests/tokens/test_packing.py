"""Rows: nothing lost, nothing repeated, labels one place further on."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm.tokens.example_rows import Example, pack_examples, row_of_examples
from tinylm.tokens.packing import IGNORE_INDEX, count_rows, document_ids, row_at
from tinylm.tokens.stream import Position, pack_stream

EOS = 0


def test_labels_are_the_inputs_one_place_further_on() -> None:
    """S0's rule y = x shifted by one: for tokens 1..5 the row at 0 of length 4 is 1234 and asks for 2345."""
    inputs, labels = row_at(np.array([1, 2, 3, 4, 5], dtype=np.uint16), 0, 4, EOS)
    assert inputs.tolist() == [1, 2, 3, 4]
    assert labels.tolist() == [2, 3, 4, 5]
    assert inputs.dtype == labels.dtype == np.int64


@pytest.mark.slow
@given(n_tokens=st.integers(2, 200), seq_len=st.integers(1, 20))
def test_rows_ask_for_every_token_but_the_first_exactly_once(n_tokens: int, seq_len: int) -> None:
    """Labels that are not padding, row after row, are tokens 1..n-1 in order."""
    tokens = np.arange(n_tokens)
    rows = [
        row_at(tokens, row * seq_len, seq_len, pad_id=0)[1]
        for row in range(count_rows(n_tokens, seq_len, seq_len))
    ]
    asked = np.concatenate(rows)
    assert asked[asked != IGNORE_INDEX].tolist() == list(range(1, n_tokens))


@given(n_tokens=st.integers(3, 100), seq_len=st.integers(2, 10), data=st.data())
def test_overlapping_windows_start_every_stride_tokens_and_reach_the_end(
    n_tokens: int, seq_len: int, data: st.DataObject
) -> None:
    """S0's sliding window: the last row asks for the last token, and one row fewer would not."""
    stride = data.draw(st.integers(1, seq_len))
    rows = count_rows(n_tokens, seq_len, stride)
    last = row_at(np.arange(n_tokens), (rows - 1) * stride, seq_len, 0)[1]
    assert last.max() == n_tokens - 1
    if rows > 1:
        assert row_at(np.arange(n_tokens), (rows - 2) * stride, seq_len, 0)[1].max() < n_tokens - 1


def test_eos_opens_the_next_document() -> None:
    """The EOS that closes 7 7 is the first input of the document 8 8, which is asked for 8 given EOS alone."""
    assert document_ids(np.array([[7, 7, EOS, 8, 8, EOS, 9]]), EOS).tolist() == [
        [0, 0, 1, 1, 1, 2, 2]
    ]


START = Position(0, 0, 0)


def stream(
    documents: list[list[int]], start: Position = START
) -> list[tuple[Position, np.ndarray]]:
    """Documents as `pack_stream` takes them, from `start` on."""
    pieces = []
    for number, ids in enumerate(documents[start.document :], start.document):
        offset = start.token if number == start.document else 0
        if offset < len(ids):
            pieces.append((Position(start.passes, number, offset), np.array(ids[offset:])))
    return pieces


documents_of_tokens = st.lists(
    st.lists(st.integers(0, 99), min_size=1, max_size=30), min_size=1, max_size=12
)


@pytest.mark.slow
@given(documents_of_tokens, st.integers(1, 8))
def test_a_packed_stream_is_its_tokens_in_order(documents: list[list[int]], seq_len: int) -> None:
    """Each row's inputs are the next T tokens, and its last token, a target only, opens the next row."""
    tokens = [token for ids in documents for token in ids]
    rows = [row.tolist() for row, _ in pack_stream(iter(stream(documents)), seq_len)]
    assert len(rows) == (len(tokens) - 1) // seq_len
    assert [token for row in rows for token in row[:-1]] == tokens[: len(rows) * seq_len]
    assert all(row[-1] == following[0] for row, following in pairwise(rows))


@pytest.mark.slow
@given(documents_of_tokens, st.integers(1, 8))
def test_packing_goes_on_at_any_row_border(documents: list[list[int]], seq_len: int) -> None:
    """From the place that comes with row i, rows i+1, i+2, ... follow unchanged: what an exact resume rests on."""
    whole = [(row.tolist(), place) for row, place in pack_stream(iter(stream(documents)), seq_len)]
    for i, (_, place) in enumerate(whole):
        rest = [
            (row.tolist(), end) for row, end in pack_stream(iter(stream(documents, place)), seq_len)
        ]
        assert rest == whole[i + 1 :]


# --- examples of fine-tuning ------------------------------------------------------------------------------------------

lengths_and_room = st.integers(1, 40).flatmap(
    lambda room: st.tuples(st.lists(st.integers(1, room), max_size=60), st.just(room))
)


@pytest.mark.slow
@given(lengths_and_room)
def test_every_example_is_in_one_row_whole_and_no_row_holds_too_much(
    case: tuple[list[int], int],
) -> None:
    """And no two rows could be one: an example opens a row only where no other has room for it."""
    lengths, room = case
    rows = pack_examples(lengths, room)
    held = [sum(lengths[number] for number in row) for row in rows]
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(inputs <= room for inputs in held)
    assert all(a + b > room for i, a in enumerate(held) for b in held[:i])


def test_the_longest_example_goes_where_the_least_room_is_left() -> None:
    """Room 10: 7 and 6 open rows; 3 fills the first to the brim, 4 the second.

    First come, first served would take three rows.
    """
    assert pack_examples([3, 4, 6, 7], 10) == [[3, 0], [2, 1]]


def test_an_example_that_is_longer_than_a_row_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="example 1 has 11 inputs, and a row has 10"):
        pack_examples([3, 11], 10)


def test_a_row_asks_each_example_for_its_trained_tokens_alone() -> None:
    """Of 5 6 7 8 the last two are asked for, of 5 9 the last: never an example's first token, which nothing
    comes before.
    """
    examples = [
        Example(np.array(ids), np.array(trained))
        for ids, trained in (([5, 6, 7, 8], [False, False, True, True]), ([5, 9], [False, True]))
    ]
    inputs, labels, documents = row_of_examples(examples, 6, pad_id=0)
    assert inputs.tolist() == [5, 6, 7, 5, 0, 0]
    assert labels.tolist() == [IGNORE_INDEX, 7, 8, 9, IGNORE_INDEX, IGNORE_INDEX]
    assert documents.tolist() == [0, 0, 0, 1, 2, 2]
    assert inputs.dtype == labels.dtype == documents.dtype == np.int64


def test_a_row_of_nothing_is_padding() -> None:
    inputs, labels, _ = row_of_examples([], 3, pad_id=7)
    assert (inputs.tolist(), labels.tolist()) == ([7, 7, 7], [IGNORE_INDEX] * 3)
