"""BPE by hand: merges and ids that are derived in the docstrings; the fast learner gives the same ones."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm.text.documents import text_chunks
from tinylm.tokenizer.bpe import Merge, decode, encode, train
from tinylm.tokenizer.bpe_fast import learn_bpe
from tinylm.tokenizer.hf import HFTokenizer
from tinylm.tokenizer.pretokenize import PATTERNS, Pretokenizer

EOT = "<|endoftext|>"
# A regular expression of one's own: up to three words as one, digits apart, signs between the words.
OWN = r"(?: ?\p{L}+){1,3}|\p{N}|\s+"
Train = Callable[[list[str], int], list[Merge]]


def train_fast(texts: list[str], n_merges: int) -> list[Merge]:
    """`train` with bpe_fast.py; the vocabulary also has 256 bytes and 2 special tokens."""
    return list(learn_bpe(text_chunks(texts), 258 + n_merges, Pretokenizer()).merges)


both_learners = pytest.mark.parametrize("train", [train, train_fast], ids=["readable", "fast"])


def words(**counts: int) -> list[str]:
    """Texts of one word each, so that no word has a space."""
    return [word for word, count in counts.items() for _ in range(count)]


@both_learners
def test_merges_of_ten_words(train: Train):
    """`low` 5, `lower` 2, `newest` 1, `widest` 2: of the pairs, o w and l o occur 7 times, w e 3, e s and s t 3.

    merge  pair        count   why
        1  o w             7   l o has 7 too; o is greater than l
        2  l ow            7
        3  s t             3   e s has 3 too; low e, e r, w i, i d, d e have 2
        4  e st            3
        5  w i             2   the greatest of w i, low e, i d, e r, d est
        6  wi d            2   the greatest of wi d, low e, e r, d est
        7  wid est         2   the greatest of wid est, low e, e r
        8  low e           2   e r has 2 too
        9  lowe r          2
    """
    texts = words(low=5, lower=2, newest=1, widest=2)
    expected = [b"o w", b"l ow", b"s t", b"e st", b"w i", b"wi d", b"wid est", b"low e", b"lowe r"]
    assert train(texts, 9) == [tuple(pair.split(b" ")) for pair in expected]


@both_learners
def test_among_equally_frequent_pairs_the_greatest_bytes_win(train: Train):
    """B A > A Z: the left token decides. A BA > A B: of two with the same beginning the longer one is greater."""
    assert train(words(AZ=1, BA=1), 1) == [(b"B", b"A")]
    assert train(words(BA=3, ABA=1, AB=2), 2) == [(b"B", b"A"), (b"A", b"B")]
    assert train(words(BA=3, ABA=1, AB=1), 2)[1] == (b"A", b"BA")


@both_learners
def test_a_run_is_counted_at_every_position_and_replaced_from_the_left(train: Train):
    """`aaa` has a a twice, `bc` in two words has b c twice: the greater pair wins. Then `aaa` is aa a."""
    assert train(words(aaa=1, bc=2), 3) == [(b"b", b"c"), (b"a", b"a"), (b"aa", b"a")]
    assert train(words(aaaaa=1), 3) == [(b"a", b"a"), (b"aa", b"aa"), (b"aaaa", b"a")]


@both_learners
def test_training_ends_when_every_word_is_one_token(train: Train):
    assert train(words(low=2, a=5), 10) == [(b"o", b"w"), (b"l", b"ow")]
    assert train(words(a=5), 10) == []


@both_learners
def test_no_merge_crosses_a_word_or_a_special_token(train: Train):
    """`ab` and `·ab` have only a b and · a (· is the space); nothing joins `b` to the next word, or `<` to `|`."""
    text = f"ab ab ab{EOT}ab ab{EOT}ab"
    assert train([text], 10) == [(b"a", b"b"), (b" ", b"ab")]


def test_the_example_of_wikipedias_article():
    """aaabdaaabac becomes XdXac with X = aaab: aa -> 256, aaa -> 257, aaab -> 258; d, a and c are bytes."""
    merges = train(["aaabdaaabac"], 3)
    assert encode("aaabdaaabac", merges) == [258, 100, 258, 97, 99]


def test_the_merge_that_was_learned_first_is_made_first():
    """abc with merges b c, then a b: bc is made first, and a bc has no merge. In the other order, ab c."""
    assert encode("abc", [(b"b", b"c"), (b"a", b"b")]) == [97, 256]
    assert encode("abc", [(b"a", b"b"), (b"b", b"c")]) == [256, 99]


def test_a_text_that_spells_a_special_token_is_text():
    """The words of <|endoftext|> are `<|`, `endoftext` and `|>`: with the merge < | its first token is 256."""
    assert encode(EOT, [(b"<", b"|")]) == [256, *b"endoftext|>"]


def test_half_a_character_decodes_to_the_replacement_character():
    assert decode([0xC3], []) == "\ufffd"


@pytest.mark.parametrize("pattern", [*PATTERNS, OWN])
@settings(deadline=None, max_examples=50)
@given(text=st.text(st.sampled_from("abé東 \n1'<|s"), max_size=40))
def test_ids_equal_those_of_the_library_and_decode_to_the_text(pattern, text, merges_of):
    merges, library = merges_of(pattern)
    ids = encode(text, merges, pattern)
    assert ids == library.encode(text)
    assert decode(ids, merges) == text


@pytest.fixture(scope="module")
def merges_of() -> Callable[[str], tuple[list[Merge], HFTokenizer]]:
    """40 merges, and a tokenizer of the `tokenizers` library that is made from them."""
    texts = ["abab ab's 東b東b aébé 11 1a1 ||< <|s|>\n\nba ab aab"] * 3
    learned = {
        pattern: learn_bpe(text_chunks(texts), 298, Pretokenizer(pattern))
        for pattern in (*PATTERNS, OWN)
    }
    tokenizers = {
        pattern: HFTokenizer(bpe.backend(), eos=bpe.eos, pad=bpe.pad)
        for pattern, bpe in learned.items()
    }
    return lambda pattern: (list(learned[pattern].merges), tokenizers[pattern])
