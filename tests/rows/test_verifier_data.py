"""Rows of a verifier with a label: 0 is a wrong answer, 1 a right one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinylm.common.errors import UserError
from tinylm.config.schema import DataConfig
from tinylm.rows.skipped_rows import RowReport
from tinylm.rows.verifier_data import (
    GradedAnswer,
    Problem,
    build_verifier_examples,
    filter_problems,
    fingerprint_of_problems,
    graded_answers,
    read_problems,
)
from tinylm.tokenizer.byte_char import ByteTokenizer

TOKENIZER = ByteTokenizer()
Read = Callable[..., list[Problem]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read(*rows: Any, report: RowReport | None = None, **settings: Any) -> list[Problem]:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data = DataConfig(dataset=str(path), val_fraction=1e-9, **settings)
        return read_problems(data, "train", 0, report=report)

    return read


def row(answer: str, question: str = "2+2?", **columns: Any) -> dict[str, Any]:
    return {"prompt": question, "completion": answer} | columns


def test_a_row_with_label_0_is_one_wrong_answer(read: Read) -> None:
    right, wrong = read(row("4", label=1), row("5", label=0))
    assert graded_answers(wrong, n_wrong=3, seed="0") == [GradedAnswer("5", False)]
    assert graded_answers(right, n_wrong=3, seed="0") == [GradedAnswer("4", True)]


@pytest.mark.parametrize(
    ("label", "is_right"), [(0, False), (False, False), (0.0, False), (1, True), (True, True)]
)
def test_a_label_is_a_number_or_a_boolean(read: Read, label: Any, is_right: bool) -> None:
    [problem] = read(row("4", label=label))
    assert problem.is_right == is_right


def test_a_row_without_a_label_is_right_and_has_the_same_fingerprint_as_before(read: Read) -> None:
    """The fingerprint decides whether a run can be resumed."""
    problems = read(row("4"), row("6", "3+3?", label=None))
    assert [problem.label for problem in problems] == [None, None]
    assert fingerprint_of_problems(problems) == fingerprint_of_problems(
        [Problem("", problem.question, problem.answer) for problem in problems]
    )
    assert fingerprint_of_problems(read(row("4", label=0))) != fingerprint_of_problems(
        read(row("4", label=1))
    )


def test_the_error_of_a_labeled_answer_is_where_it_differs_from_the_right_one(read: Read) -> None:
    """Bytes: problem 2+2? EOS is 0 to 4, so the last character of "2 = 5" is at 9."""
    _, wrong, alone = read(
        row("2 = 4", label=1), row("2 = 5", label=0), row("2 = 5", "3+3?", label=0)
    )
    [example] = build_verifier_examples(wrong, TOKENIZER, 32, n_wrong=1, seed="0")
    assert (example.right, example.error_positions) == (False, (9,))
    [example] = build_verifier_examples(alone, TOKENIZER, 32, n_wrong=1, seed="0")
    assert (example.right, example.error_positions) == (False, (5, 6, 7, 8, 9))


def test_a_labeled_answer_needs_no_number(read: Read) -> None:
    """Without a label an answer is trained on only if a wrong one can be made from it."""
    problems = read(row("yes", label=1), row("no", label=0), row("maybe"))
    report = RowReport("train", 64)
    kept = filter_problems(problems, report, TOKENIZER, n_wrong=1)
    assert [problem.answer for problem in kept] == ["yes", "no"]


def test_another_column_can_be_the_label(read: Read) -> None:
    [problem] = read(row("4", correct=False), columns={"label": "correct"})
    assert not problem.is_right


@pytest.mark.parametrize(("label", "got"), [(2, "2"), ("wrong", "wrong"), ([1], "a list")])
def test_another_label_is_an_error(read: Read, label: Any, got: str) -> None:
    with pytest.raises(UserError) as refused:
        read(row("4", label=label))
    assert str(refused.value).endswith(
        "a.jsonl:1: label: must be 1 or true (a right answer), or 0 or false (a wrong one), "
        f"got {got}. Correct the row, or remove it. data.skip_bad_rows=N skips up to N such rows."
    )


def test_columns_that_are_not_read_are_named_and_rows_with_a_mistake_are_skipped(
    read: Read,
) -> None:
    report = RowReport("train", 64, max_bad=1)
    problems = read(row("4", label=0, score=3), row("", label=1), report=report)
    assert len(problems) == 1
    assert report.bad[0].endswith("a.jsonl:2: completion: must not be empty")
    assert list(report.unread_columns) == ["score"]


def test_a_last_answer_of_weight_0_is_an_error(read: Read) -> None:
    messages = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4", "weight": 0},
    ]
    with pytest.raises(UserError, match="last turn: its weight must be 1 for a verifier, got 0."):
        read({"messages": messages})
