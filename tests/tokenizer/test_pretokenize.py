"""Words: the same as in the library that encodes, none across a special token, counted by light processes."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from tinylm.common.errors import UserError
from tinylm.config import split_pattern
from tinylm.tokenizer.pretokenize import PATTERNS, Pretokenizer, gpt2_form

# Regular expressions of one's own: several words as one, letters alone, camel case, a group.
OWN = [
    r"(?: ?\p{L}+){1,3}|\p{N}| ?[^\s\p{L}\p{N}]+|\s+",
    r"\p{L}+",
    r"\p{Lu}?\p{Ll}+|\p{N}{1,3}",
    "(a)(B)?|東",
]
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
@given(
    text=st.text(
        st.one_of(
            st.characters(exclude_categories=["Cn", "Cs"]), st.sampled_from(" \n\r\t'.a1\u3000\x1c")
        ),
        max_size=40,
    )
)
def test_words_equal_those_of_the_library_that_encodes(pattern, text):
    """Otherwise merges would be learned that no text can use. The words, concatenated, are the text.

    Unassigned characters are excluded: which of them are letters depends on a library's version of Unicode.
    """
    found = Pretokenizer(pattern, special_tokens=()).split(text)
    pieces = pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated").pre_tokenize_str(text)
    assert found == [word for word, _ in pieces]
    assert "".join(found) == text


def test_words_end_at_special_tokens_and_the_longest_of_overlapping_ones_counts():
    pretokenizer = Pretokenizer(special_tokens=("<|a|>", "<|a|><|a|>"))
    assert pretokenizer.split("x<|a|><|a|>y<|a|>z") == ["x", "y", "z"]


@pytest.mark.parametrize("pattern", OWN)
@given(
    text=st.text(
        st.one_of(st.characters(exclude_categories=["Cn", "Cs"]), st.sampled_from(" \n\t'.aB1東")),
        max_size=40,
    )
)
def test_words_of_a_regular_expression_equal_those_of_the_library_and_are_the_text(pattern, text):
    """Also what the expression does not match, which the library keeps as pieces of its own."""
    found = Pretokenizer(pattern, special_tokens=()).split(text)
    pieces = pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)
    assert found == [word for word, _ in pieces]
    assert "".join(found) == text


def test_an_expression_without_end_in_a_text_names_the_text(monkeypatch):
    """A letter 40 times can be divided in 2^40 ways; the check of a config had no such run."""
    monkeypatch.setattr(split_pattern, "SECONDS", 0.01)
    with pytest.raises(UserError) as caught:
        Pretokenizer("(q|qq)+$", special_tokens=()).split("q" * 40 + "!")
    assert str(caught.value) == (
        "tokenizer.pattern: (q|qq)+$ backtracks without end in a text of 41 characters that begins "
        f"with '{'q' * 40}'. Write a pattern without nested repetitions, or remove the text."
    )


@pytest.mark.slow
def test_a_process_that_counts_words_imports_neither_numpy_nor_pydantic():
    """18 MB instead of 52 per process."""
    code = (
        "import sys, tinylm.tokenizer.pretokenize, tinylm.common.processes; "
        "heavy = ('numpy', 'pydantic', 'tinylm.config.schema'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "[]\n"


def test_the_visible_form_of_bytes_is_gpt2s():
    assert gpt2_form(b" a\n\xff") == "ĠaĊÿ"
