"""The fast learner: the merges of the readable one, close to another library's, whatever the processes."""

import json
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from tinylm.common.errors import UserError
from tinylm.text.chunks import word_chunks
from tinylm.text.documents import TextChunk, text_chunks
from tinylm.text.named_sources import sources_named
from tinylm.tokenizer import bpe, bpe_fast
from tinylm.tokenizer.bpe_fast import WordTable, count_words_of, learn_bpe, learn_merges
from tinylm.tokenizer.pretokenize import PATTERNS, Pretokenizer, count_words

EOT = "<|endoftext|>"


# --- the merges of bpe.py ---


@pytest.mark.slow
@pytest.mark.parametrize("rarer", [2, 16])
@settings(deadline=None)
@given(
    counts=st.dictionaries(
        st.text("abé東", min_size=1, max_size=14), st.integers(1, 99), min_size=1, max_size=15
    )
)
def test_merges_equal_those_of_the_readable_learner_until_no_pair_is_left(rarer, counts):
    """Also if many rare pairs are not in the heap at first, and have to be found later."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe_fast, "RARER", rarer)
        merges = learn_merges(counts, 300)
    texts = (word for word, count in counts.items() for _ in range(count))
    assert merges == bpe.train(texts, 300)


@pytest.mark.slow
@given(
    counts=st.dictionaries(st.text("abé", min_size=1), st.integers(1, 9), min_size=1, max_size=9)
)
def test_no_two_merges_make_the_same_token(counts):
    merges = learn_merges(counts, 300)
    assert len({left + right for left, right in merges}) == len(merges)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_merges_of_a_text_equal_those_of_the_readable_learner(small_text, pattern):
    text, pretokenizer = small_text[:20_000], Pretokenizer(pattern)
    learned = learn_bpe(text_chunks([text]), 258 + 120, pretokenizer)
    assert list(learned.merges) == bpe.train([text], 120, pretokenizer)


def test_a_word_that_occurs_four_billion_times_is_counted():
    """Counts are stored in the smallest type that holds each of them, and added in a larger one."""
    counts = {"ab": 2**32 - 1, "cb": 2**32 - 1, "ac": 2**31, "xac": 2**31 + 1}
    assert learn_merges(counts, 1) == [(b"a", b"c")]


def test_a_vocabulary_that_no_text_allows_takes_no_memory():
    """The sizes of two billion tokens would be 8 GB. `low` and its separators are five bytes, and allow two merges."""
    assert len(WordTable({"low": 2}, 2**31 - 1).sizes) == 256 + 5
    assert len(learn_merges({"low": 2}, 2**31 - 300)) == 2


def n_calls(learn: Callable[[], object]) -> int:
    """How many functions it calls: its cost, the same on every machine."""
    calls: Counter[str] = Counter()
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, arg: calls.update([event]))
    try:
        learn()
    finally:
        sys.setprofile(before)
    return calls["call"] + calls["c_call"]


@pytest.mark.slow
def test_learning_costs_little_more_for_ten_times_the_text(small_text):
    """It counts the words of a text in one call each chunk, and merges each distinct word once."""
    short = small_text[:13_000]
    calls = [
        n_calls(lambda text=text: learn_bpe(text_chunks([text]), 500, Pretokenizer()))
        for text in (short, short * 10)
    ]
    assert calls[1] < 1.5 * calls[0]


# --- another library ---


def library_backend(text: str, vocab_size: int, pattern: str) -> Backend:
    """What `tokenizers` learns from the text."""
    backend = Backend(models.BPE())
    words = pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([piece for piece in text.split(EOT) if piece], trainer)
    return backend


def test_merges_equal_the_librarys_if_no_two_counts_are_equal():
    """Words of one pair each, without common letters, that occur 1, 2, 4, ... times: the last is the first merge."""
    words = ["ab", "cd", "ef", "gh", "ij", "kl", "mn"]
    text = EOT.join(word for power, word in enumerate(words) for _ in range(2**power))
    theirs = json.loads(library_backend(text, 264, "gpt2").to_str())["model"]["merges"]
    ours = learn_merges(count_words([text], Pretokenizer(special_tokens=(EOT,))), 7)
    assert [[left.decode(), right.decode()] for left, right in ours] == theirs
    assert theirs == [list(word) for word in reversed(words)]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_bytes_per_token_are_the_librarys_within_a_fifth_of_a_percent(small_text, pattern):
    ours = learn_bpe(text_chunks([small_text]), 1000, Pretokenizer(pattern, (EOT,))).backend()
    theirs = library_backend(small_text, 1000, pattern)
    pieces = small_text.split(EOT)
    n_ours, n_theirs = (
        sum(len(encoding.ids) for encoding in backend.encode_batch(pieces))
        for backend in (ours, theirs)
    )
    assert ours.get_vocab_size() == theirs.get_vocab_size() == 1000
    assert n_ours == pytest.approx(n_theirs, rel=0.002)


# --- words and processes ---


@pytest.mark.slow
def test_no_part_of_a_special_token_is_in_a_merge(small_text):
    """`<|endoftext|>` is as frequent as a common word here: if it were not special, its letters
    would be merged (E16).
    """
    learned = learn_bpe(text_chunks([small_text]), 2000, Pretokenizer())
    tokens = learned.vocabulary().keys() - set(learned.pretokenizer.special_tokens)
    assert [token for token in tokens if "<|" in token or "|>" in token] == []
    other = Pretokenizer(special_tokens=("<|none|>",))
    tokens = learn_bpe(text_chunks([small_text]), 2000, other).vocabulary()
    assert [token for token in tokens if "endoftext" in token and token != EOT]


@pytest.mark.parametrize("text", ["", EOT])
def test_a_text_without_words_is_an_error(text):
    with pytest.raises(UserError) as caught:
        learn_bpe(text_chunks([text]), 300, Pretokenizer())
    assert str(caught.value) == (
        "tokenizer: the text has no words to learn from. Give a file with text."
    )


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_merges(file_in_parts):
    source = sources_named([str(file_in_parts)])
    one, two, four = (
        learn_bpe(word_chunks(source, processes), 1000, Pretokenizer(), processes=processes)
        for processes in (1, 2, 4)
    )
    assert len(one.merges) == 742
    assert one.merges == two.merges == four.merges


def test_a_small_text_starts_no_process(file_in_parts, monkeypatch):
    monkeypatch.setattr(
        "tinylm.common.processes.ProcessPoolExecutor", None
    )  # calling it would fail
    monkeypatch.setattr(bpe_fast, "MIN_SIZE_FOR_PROCESSES", file_in_parts.stat().st_size + 1)
    chunks = word_chunks(sources_named([str(file_in_parts)]), 2)
    assert len(learn_bpe(chunks, 300, Pretokenizer(), processes=2).merges) == 42


class Deadly(TextChunk):
    """A chunk that kills the process that counts it, as the system does when memory runs out."""

    size = 1

    def texts(self) -> list[str]:
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return []


@pytest.mark.slow
def test_a_killed_process_is_an_error_and_does_not_hang(monkeypatch):
    monkeypatch.setattr(bpe_fast, "MIN_SIZE_FOR_PROCESSES", 0)
    with pytest.raises(UserError, match="worker process: killed, possibly out of memory"):
        count_words_of([Deadly([])] * 5, Pretokenizer(), processes=2)
