"""Words: the same as in the library that encodes, none across a special token, counted by light processes."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from tinylm.tokenizer.pretokenize import PATTERNS, Pretokenizer, gpt2_form

ROOT = Path(__file__).parents[2]


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
