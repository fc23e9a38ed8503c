"""tiktoken in the place of `tokenizers`: equal ids for vocabularies drawn at random, and none where
they could differ.
"""

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext.openai_public import r50k_pat_str
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tinylm.tokenizer.hf import HFTokenizer
from tinylm.tokenizer.hf_files import load_hf_tokenizer
from tinylm.tokenizer.pretokenize import BYTE_OF_CHARACTER, LAST_CUT, PATTERNS, gpt2_form
from tinylm.tokenizer.tiktoken_encoder import build_tiktoken_encoder

ALPHABET = list(BYTE_OF_CHARACTER)
EOT = "<|endoftext|>"
# What patterns tell apart: letters of several scripts, a combining mark, digits, apostrophes,
# spaces of all kinds, a NUL, emoji.
LETTERS = ["a", "ab", "aba", "A", "é", "東", "e\u0301", "\u017f"]
SIGNS = ["1", "2345", "½", "'", "'s", "'LL", "!", "/", "。", "👩\u200d🚀"]
SPACES = [" ", "  ", "\n", "\r\n", "\t", "\u3000", "\x85", "\0"]
texts = st.one_of(
    st.text(), st.lists(st.sampled_from(LETTERS + SIGNS + SPACES), max_size=30).map("".join)
)


def byte_level(
    tokens: list[str], merges: list[tuple[str, str]], *, pattern: str | None = None, **options: Any
) -> Backend:
    """Byte-level BPE with ids in the order of `tokens`; GPT-2's words, or those of `pattern`."""
    backend = Backend(models.BPE({token: id for id, token in enumerate(tokens)}, merges, **options))
    words = pre_tokenizers.Split(Regex(pattern), "isolated") if pattern else None
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_alone]) if words else bytes_alone
    return backend


def fast_of(backend: Backend, never: tuple[int, ...] = ()) -> Any:
    return build_tiktoken_encoder(json.loads(backend.to_str()), never)


# --- the same ids -----------------------------------------------------------------------------------------------------


@st.composite
def vocabularies(draw: st.DrawFn) -> Backend:
    """Any merges of `a`, `b`, the space and 東, which is not the form of any byte; learned in order
    or shuffled; with tokens that no merge makes.
    """
    pool, merges = ["a", "b", "Ġ", "東"], []
    for _ in range(draw(st.integers(0, 14))):
        pair = draw(st.sampled_from(pool)), draw(st.sampled_from(pool))
        merges += [pair] if pair not in merges else []
        pool = list(dict.fromkeys([*pool, "".join(pair)]))
    merges = draw(st.permutations(merges)) if draw(st.booleans()) else merges
    tokens = [
        *ALPHABET,
        *pool[2:],
        *draw(st.lists(st.text("abĠ", min_size=2, max_size=4), max_size=2)),
    ]
    tokens = list(dict.fromkeys(draw(st.permutations(tokens)) if draw(st.booleans()) else tokens))
    return byte_level(tokens, merges, ignore_merges=draw(st.booleans()))


@pytest.mark.slow
def test_ids_are_the_librarys_for_any_vocabulary_that_is_taken():
    """And most are taken, else this would show nothing: of the 200 that are drawn some 160."""
    taken = []

    @settings(deadline=None, max_examples=200, database=None)
    @given(
        backend=vocabularies(),
        texts=st.lists(st.text("ab 東", max_size=30), min_size=3, max_size=6),
    )
    def draw(backend: Backend, texts: list[str]) -> None:
        fast = fast_of(backend)
        taken.append(fast is not None)
        if fast is not None:
            assert [fast.encode(text).tolist() for text in texts] == [
                backend.encode(text).ids for text in texts
            ]

    draw()
    assert sum(taken) > 0.5 * len(taken)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [None, *PATTERNS.values()], ids=["as ByteLevel", *PATTERNS])
@settings(deadline=None)
@given(text=texts)
def test_words_are_the_librarys_for_any_text(pattern, text):
    backend = byte_level(
        [*ALPHABET, "ab", "aba", "Ġa", "ĠĠ", "<|"],
        [("a", "b"), ("ab", "a"), ("Ġ", "a"), ("Ġ", "Ġ"), ("<", "|")],
        pattern=pattern,
    )
    assert fast_of(backend).encode(text).tolist() == backend.encode(text).ids


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
def test_every_character_is_of_the_same_kind_for_both(pattern):
    """After a letter, a digit and a sign, each of which has a merge with any first byte."""
    characters = [
        chr(c) for c in range(0x40000) if not 0xD800 <= c < 0xE000
    ]  # beyond are tags and private use
    first = [gpt2_form(bytes((byte,))) for byte in {c.encode()[0] for c in characters}]
    merges = [(before, byte) for before in "a1!" for byte in first]
    backend = byte_level([*ALPHABET, *map("".join, merges)], merges, pattern=pattern)
    text = "".join(f"a{c}1{c}!{c}" for c in characters)
    assert np.array_equal(fast_of(backend).encode(text), backend.encode_batch_fast([text])[0].ids)


def test_a_long_word_is_joined_as_a_short_one_is():
    """tiktoken takes another way for words of some hundred bytes."""
    backend = byte_level(
        [*ALPHABET, "aa", "ab", "aab", "bb", "aabbb"],
        [("a", "a"), ("a", "b"), ("a", "ab"), ("b", "b"), ("aab", "bb")],
    )
    text = "".join(random.Random(1).choices("ab", k=5000))
    assert fast_of(backend).encode(text).tolist() == backend.encode(text).ids


needs_gpt2 = pytest.mark.skipif(
    "GPT2_BPE" not in os.environ,
    reason="GPT2_BPE names a folder with GPT-2's vocab.json and merges.txt",
)


@pytest.fixture(scope="module")
def gpt2() -> HFTokenizer:
    return load_hf_tokenizer(os.environ["GPT2_BPE"])


@pytest.fixture(scope="module")
def tiktokens_gpt2() -> tiktoken.Encoding:
    """tiktoken's own definition of gpt2, which it would download, from the same files."""
    vocabulary = json.loads(
        (Path(os.environ["GPT2_BPE"]) / "vocab.json").read_text(encoding="utf-8")
    )
    special = {EOT: vocabulary.pop(EOT)}
    ranks = {
        b"".join(map(BYTE_OF_CHARACTER.__getitem__, token)): id for token, id in vocabulary.items()
    }
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens=special,
        explicit_n_vocab=50257,
    )


@needs_gpt2
@settings(deadline=None)
@given(text=texts)
def test_gpt2s_ids_are_those_of_tokenizers_and_tiktoken(gpt2, tiktokens_gpt2, text):
    assert gpt2.fast is not None
    assert (
        gpt2.encode(text)
        == gpt2._encode_slowly([text])[0].tolist()
        == tiktokens_gpt2.encode_ordinary(text)
    )


@needs_gpt2
@settings(deadline=None)
@given(parts=st.lists(st.one_of(texts, st.just(EOT))))
def test_gpt2s_special_token_is_tiktokens_where_it_is_allowed(gpt2, tiktokens_gpt2, parts):
    text = "".join(parts)
    expected = tiktokens_gpt2.encode(text, allowed_special="all")
    assert (
        gpt2.encode(text, allowed_special="all")
        == list(gpt2.encode_iterable(parts, allowed_special={EOT}))
        == expected
    )


# --- where they could differ ------------------------------------------------------------------------------------------

TOKENS = [*ALPHABET, "ab", "bc", "abc"]
MERGES = [("a", "b"), ("ab", "c")]


def prefixed() -> Backend:
    backend = byte_level(TOKENS, MERGES)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return backend


def normalized() -> Backend:
    backend = byte_level(TOKENS, MERGES)
    backend.normalizer = normalizers.NFC()
    return backend


REFUSED = {
    "another kind of model": Backend(models.WordLevel({"a": 0}, "a")),
    "a space in front": prefixed(),
    "a normalizer": normalized(),
    "an unknown pattern": byte_level(TOKENS, MERGES, pattern=r"\S+|\s+"),
    "merges dropped at random": byte_level(TOKENS, MERGES, dropout=0.5),
    "a prefix for continued words": byte_level(
        [*TOKENS, "##b", "##c"], [], continuing_subword_prefix="##"
    ),
    "a byte without a token": byte_level(TOKENS[1:], MERGES),
    # `abac`: `b a` is first, then `ba c`, so that `aba`, whose first merge is the very first of all, never is.
    "two merges of a token with others between": byte_level(
        [*ALPHABET, "ab", "ba", "aba", "bac"],
        [("ab", "a"), ("b", "a"), ("a", "b"), ("ba", "c"), ("a", "ba")],
    ),
    # `xabc` is `x ab c`: `tokenizers` has no merge for `ab c`, tiktoken would see the token `abc`.
    "a whole word that is two tokens inside another": byte_level(
        TOKENS, [("a", "b")], ignore_merges=True
    ),
}


@pytest.mark.parametrize("backend", REFUSED.values(), ids=REFUSED.keys())
def test_a_tokenizer_whose_ids_could_differ_has_no_fast_encoder(backend):
    assert fast_of(backend) is None


def test_a_token_that_no_merge_makes_is_omitted():
    """`abc` has a merge, `bc` has none: with it tiktoken would join `b c` in `xbc`."""
    backend = byte_level(TOKENS, MERGES)
    ids = {token: id for id, token in enumerate(TOKENS)}
    assert [fast_of(backend).encode(text).tolist() for text in ("abc", "bc")] == [
        [ids["abc"]],
        [ids["b"], ids["c"]],
    ]


def test_a_special_token_that_merges_would_make_excludes_the_fast_encoder():
    """`abc` ends texts here: the letters of a user are cut into `a` and `bc`, which only the slow way knows to do."""
    backend = byte_level(TOKENS, MERGES)
    assert fast_of(backend, never=(TOKENS.index("abc"),)) is None
    tokenizer = HFTokenizer(backend, eos="abc", pad=None)
    assert tokenizer.encode("abc") == [TOKENS.index("a"), TOKENS.index("b"), TOKENS.index("c")]


@pytest.mark.parametrize("text", ["a<think>b", "ab", "<think>", "a <thin k>"])
def test_added_tokens_in_the_text_are_found(text):
    backend = byte_level(TOKENS, MERGES)
    backend.add_tokens([AddedToken("<think>", special=False)])
    tokenizer = HFTokenizer(backend, eos=EOT, pad=None)
    assert tokenizer.fast is not None
    assert tokenizer.encode(text) == backend.encode(text).ids


@pytest.mark.slow
def test_a_million_spaces_are_encoded_by_the_library():
    """tiktoken's regex engine gives up at them, with a ValueError and no ids.

    In a word of their own are all but the last, 1,499,999: 749,999 pairs and one alone. The last
    and `a` are two tokens.
    """
    tokenizer = HFTokenizer(byte_level([*TOKENS, "ĠĠ"], [*MERGES, ("Ġ", "Ġ")]), eos=EOT, pad=None)
    text = " " * 1_500_000 + "a"
    with pytest.raises(ValueError, match="regex"):
        tokenizer.fast.encode(text)
    assert len(tokenizer.encode_arrays([text])[0]) == 749_999 + 1 + 2


# --- where a text can be cut ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
@settings(deadline=None)
@given(text=texts, rest=texts)
def test_a_cut_text_has_the_words_of_the_whole_whatever_follows(pattern, text, rest):
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    found = LAST_CUT.search(text)
    cut = found.start() if found else 0
    both = [
        word for part in (text[:cut], text[cut:] + rest) for word, _ in words.pre_tokenize_str(part)
    ]
    assert both == [word for word, _ in words.pre_tokenize_str(text + rest)]


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("a b", 1),
        ("a  b", 1),
        ("a \t\tb", 1),
        ("a\nb", 2),
        ("東京\n東", 3),
        ("東京。東京", 2),
        ("don't", 3),
        ("a!!b", 1),
    ]
    + [("", 0), ("ab", 0), ("a\n\nb", 0), ("a\n ", 0)],
)
def test_where_a_text_is_cut(text, cut):
    """Before the space after a word; after a single line end; before punctuation. Not in a run of
    spaces or line ends.
    """
    found = LAST_CUT.search(text)
    assert (found.start() if found else 0) == cut
