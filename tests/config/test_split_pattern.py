"""A regular expression in tokenizer.pattern: what is refused where it is read, and its words."""

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from tinylm.config import split_pattern
from tinylm.config.split_pattern import NAMES, isolated_words, pattern_problem
from tinylm.tokenizer.pretokenize import PATTERNS


def test_the_names_are_those_of_the_patterns():
    assert tuple(PATTERNS) == NAMES


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_a_named_pattern_is_accepted_when_it_is_written_out(pattern):
    assert pattern_problem(pattern) is None


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("[a-z", "not a regular expression: unterminated character set at position 4"),
        ("(" * 2000, "not a regular expression: maximum recursion depth exceeded"),
        # valid for regex alone: Oniguruma has no flag `s`
        (
            "(?s).",
            "not a regular expression of the tokenizers library: Oniguruma error: undefined group option",
        ),
        # a word border, and a repetition of nothing
        (r"\b", r"\b matches the empty text, but a word has at least one character"),
        ("x*", "x* matches the empty text, but a word has at least one character"),
        # `^` begins every line in Oniguruma; ½ is no letter or digit to it
        (
            r"^\w+|.",
            r"^\w+|. finds different words in the two libraries that split texts: 'A' in regex, 'AAAA",
        ),
        (
            r"\w+",
            r"\w+ finds different words in the two libraries that split texts: ' \n \n  ½ ' in regex, "
            r"' \n \n  ' in tokenizers",
        ),
        # 2^40 ways to divide 40 letters
        ("(a+)+$", "(a+)+$ backtracks without end in a text of 1039 characters"),
    ],
)
def test_a_pattern_that_cannot_split_texts_is_refused(pattern, problem):
    assert (pattern_problem(pattern) or "").startswith(problem)


def test_a_pattern_on_which_only_regex_spends_its_time_is_refused(monkeypatch):
    """Oniguruma sees at once that no run has 41 letters; regex tries many ways to find them, for 24 ms
    on a fast machine.
    """
    monkeypatch.setattr(split_pattern, "SECONDS", 1e-4)
    monkeypatch.setattr(split_pattern, "SECONDS_PER_CHARACTER", 0.0)
    assert pattern_problem("(?:a?){40}a{41}|b+") == (
        "(?:a?){40}a{41}|b+ backtracks without end in a text of 1039 characters"
    )


@given(
    pattern=st.sampled_from(
        [r"\p{L}+", r"\d", "(a)(b)?", "é|東", r"(?<=a)b", "(?=a)", r"\s+(?!\S)"]
    ),
    text=st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("ab 1\n東"))),
)
def test_the_words_of_any_pattern_are_the_text_and_none_is_empty(pattern, text):
    words = isolated_words(regex.compile(pattern), text)
    assert "".join(words) == text
    assert "" not in words
