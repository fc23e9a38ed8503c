"""Scores of texts against other libraries, hand computations and the definition of an interval."""

import math
import sys
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinylm.common import statistics
from tinylm.common.errors import UserError
from tinylm.common.statistics import Z95, mean, wilson
from tinylm.eval import metrics
from tinylm.eval.metrics import macro_f1, rouge, token_f1
from tinylm.rows.numbers import final_number, same_number

LABELS = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1, max_size=30
)


# --- one answer ---


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", "18"),
        ("16 eggs, she sells 9.\n#### 1,234", "1234"),
        ("#### $70,000.", "70000"),
        ("####-5", "-5"),
        ("#### 12\nQuestion: what is 7 + 8?\n#### 15", "12"),
        ("#### twelve, that is 12 boxes", "12"),
        ("He pays $-3.50", "-3.50"),
        ("He owes -$3.50.", "-3.50"),
        ("10-3", "3"),
        ("(4)-3", "3"),
        ("It is .5 of 7 and so .25", ".25"),
        ("Then 3.5.", "3.5"),
        ("1,000,000 stars", "1000000"),
        ("3, 4, 5", "5"),
    ],
)
def test_the_final_number_of_an_answer(text, number):
    """The first after `####`, else the last; a minus after a number subtracts."""
    assert final_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "no idea", "#### ", "$", "-", "٣"])
def test_a_text_without_a_number_has_none_and_is_never_right(text):
    assert final_number(text) is None
    assert not same_number(text, "#### 3")


@given(
    st.integers(-(10**9), 10**9),
    st.sampled_from(
        ["{:,}", "{}", "${:,}", "{:,}.", "{}.00", "so it is {:,} in all", "x\n#### {:,}"]
    ),
)
def test_a_number_is_the_same_however_it_is_written(n, form):
    assert same_number(form.format(n), f"#### {n}")
    assert not same_number(form.format(n), f"#### {n + 1}")


@given(st.text("ab .,", max_size=20), st.text("ab .,", max_size=20))
def test_token_f1_is_symmetric_and_1_for_the_same_words(a, b):
    assert token_f1(a, b) == token_f1(b, a)
    assert 0 <= token_f1(a, b) <= 1
    assert token_f1(a, a.upper() + "!") == (1.0 if "a" in a or "b" in a else 0.0)


def test_rouge_by_hand():
    """Target: the cat sat on the mat; output: the cat lay on a mat.

    Unigrams in common: the, cat, on, mat = 4 of 6 and 6, F 2/3. Bigrams: "the cat" = 1 of 5 and 5, F 1/5.
    Longest common subsequence: the cat on mat = 4, F 2/3.
    """
    scores = rouge("The cat lay on a mat.", "the cat sat on the mat")
    assert scores == pytest.approx({"rouge1": 2 / 3, "rouge2": 1 / 5, "rougel": 2 / 3})


def test_rouge_does_not_stem():
    assert rouge("cats", "cat")["rouge1"] == 0.0


def test_a_missing_rouge_score_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    metrics._rouge_scorer.cache_clear()
    with pytest.raises(
        UserError,
        match=r'^ROUGE: needs the package rouge-score\. Install it: pip install "rouge-score>=0\.1\.2,<1"\.$',
    ):
        rouge("a", "a")


# --- many answers ---


@pytest.mark.slow
@given(LABELS)
def test_macro_f1_equals_scikit_learns(pairs):
    sklearn = pytest.importorskip("sklearn.metrics")
    outputs, targets = zip(*pairs, strict=True)
    assert macro_f1(outputs, targets).value == pytest.approx(
        sklearn.f1_score(targets, outputs, average="macro", zero_division=0)
    )


def test_macro_f1_by_hand():
    """a: precision 1/1, recall 1/2, F 2/3; b: precision 1/2, recall 1/1, F 2/3; an empty answer is
    a label that is never right, F 0."""
    assert macro_f1(["a", "b", "b"], ["a", "a", "b"]).value == pytest.approx(2 / 3)
    assert macro_f1(["a", "b", ""], ["a", "a", "b"]).value == pytest.approx((2 / 3 + 0 + 0) / 3)


@given(st.integers(0, 40), st.integers(1, 40))
def test_wilsons_interval_is_where_the_normal_test_stops_rejecting(right, more):
    """By definition an end x has |share - x| = z sqrt(x (1 - x) / n), unless it is clipped to 0 or 1."""
    n = right + more
    low, high = wilson(right / n, n)
    assert 0 <= low <= right / n <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(right / n - end) == pytest.approx(
                Z95 * math.sqrt(end * (1 - end) / n), abs=1e-6
            )


def test_the_interval_is_wilsons_for_right_and_wrong_and_a_bootstrap_otherwise():
    assert mean([1.0, 0.0, 1.0, 1.0]) == statistics.Measure(0.75, *wilson(0.75, 4))
    values = np.random.default_rng(1).random(400)
    found = mean(values)
    half = Z95 * values.std() / math.sqrt(400)
    assert (found.value, found.low, found.high) == pytest.approx(
        (values.mean(), values.mean() - half, values.mean() + half), abs=half / 8
    )


@pytest.mark.slow
def test_the_bootstrap_of_macro_f1_resamples_examples():
    """Oracle: examples drawn one by one with replacement, and scored."""
    draw = np.random.default_rng(3)
    targets = draw.choice(["a", "b"], 300, p=[0.8, 0.2])
    outputs = np.where(draw.random(300) < 0.7, targets, "a")
    found = macro_f1(outputs.tolist(), targets.tolist())
    chosen = [draw.integers(300, size=300) for _ in range(300)]
    values = [macro_f1(outputs[rows].tolist(), targets[rows].tolist()).value for rows in chosen]
    assert (found.low, found.high) == pytest.approx(
        tuple(np.percentile(values, [2.5, 97.5])), abs=0.02
    )
    assert found.low < found.value < found.high


def test_the_interval_is_a_function_of_the_seed():
    values = [n / 100 for n in range(60)]
    assert mean(values, seed=1) == mean(values, seed=1) != mean(values, seed=2)
    assert macro_f1("aabb", "abab", seed=1) == macro_f1("aabb", "abab", seed=1)
