"""Learning merges: worked by hand, equal to a slow reading of the rule, close to another library, whatever the processes."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from tinylm.__main__ import main
from tinylm.common.errors import UserError
from tinylm.config.schema import DataConfig, TokenizerConfig
from tinylm.text import chunks
from tinylm.text.chunks import part_borders, text_chunks
from tinylm.text.source_chunks import word_chunks
from tinylm.text.sources import sources_named
from tinylm.tokenizer import bpe_fast
from tinylm.tokenizer.bpe_fast import WordTable, count_words_of, learn_bpe, learn_merges
from tinylm.tokenizer.bpe_files import FILES, Bpe
from tinylm.tokenizer.factory import make_tokenizer, tokenizer_from_plain
from tinylm.tokenizer.fit import measure_fit
from tinylm.tokenizer.hf_files import load_hf_tokenizer
from tinylm.tokenizer.pretokenize import PATTERNS, Pretokenizer, count_words, gpt2_form
from training.tokenizer import tokenizer_for

ROOT = Path(__file__).parents[2]
EOT = "<|endoftext|>"


def text_of(n_bytes: int, seed: int = 1) -> str:
    """A text of invented words, frequent ones and rare ones, with numbers, punctuation and letters beyond ASCII."""
    draw = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "en", "ör")]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(3000)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    pieces: list[str] = []
    size = 0
    while size < n_bytes:
        line = " ".join(draw.choices(words, weights, k=draw.randint(3, 12))) + draw.choice(
            [".\n", ", 12 and 345\n", "!\n\n", "  \n", f"{EOT}\n"]
        )
        pieces.append(line)
        size += len(line.encode())
    return "".join(pieces).encode()[:n_bytes].decode("utf-8", "ignore")


@pytest.fixture(scope="module")
def small_text() -> str:
    return text_of(130_000)


@pytest.fixture
def file_in_parts(tmp_path, small_text, monkeypatch) -> Path:
    """More parts than four processes, so that all have something to do."""
    monkeypatch.setattr(chunks, "PART_BYTES", 13_001)
    monkeypatch.setattr(chunks, "WINDOW_BYTES", 200)
    monkeypatch.setattr(bpe_fast, "MIN_SIZE_FOR_PROCESSES", 0)
    path = tmp_path / "parts.txt"
    path.write_text(small_text, encoding="utf-8", newline="")
    return path


# --- merges -----------------------------------------------------------------------------------------------------------


def test_the_merges_of_ten_words_worked_by_hand():
    """`low` 5, `lower` 2, `newest` 1, `widest` 2: ten words, with `ow` and `lo` 7 times each, `we` 3, `es` and `st` 3.

    1. (o w) and (l o) 7: the greater is (o w).  2. (l ow) 7.  3. What is left of the rest: (e s) 3, (s t) 3, (low e) 2, (e r) 2,
    (w i) (i d) (d e) 2: the greatest of those with 3 is (s t).  4. (e st) 3.  5. With 2 are (low e) (e r) (w i) (i d) (d est):
    (w i), the greatest.  6. (wi d) and (low e) (e r) (d est) are 2, so (wi d).  7. (wid est).  8. (low e).  9. (lowe r).
    """
    words = {"low": 5, "lower": 2, "newest": 1, "widest": 2}
    expected = [b"o w", b"l ow", b"s t", b"e st", b"w i", b"wi d", b"wid est", b"low e", b"lowe r"]
    assert learn_merges(words, 9) == [tuple(pair.split(b" ")) for pair in expected]


def test_of_equally_frequent_pairs_the_lexicographically_greatest_bytes_win():
    """(B A) > (A Z): the left one decides; (A BA) > (A B): the longer one of two with the same start."""
    assert learn_merges({"AZ": 1, "BA": 1}, 1) == [(b"B", b"A")]
    assert learn_merges({"BA": 3, "ABA": 1, "AB": 2}, 2) == [(b"B", b"A"), (b"A", b"B")]
    assert learn_merges({"BA": 3, "ABA": 1, "AB": 1}, 2)[1] == (b"A", b"BA")


def test_a_run_is_replaced_from_the_left_and_counted_at_every_place():
    """`aaa` has (a a) twice, as `bc bc` in two words has (b c): the greater pair wins; then `aaa` is `aa a`."""
    assert learn_merges({"aaa": 1, "bc": 2}, 3) == [(b"b", b"c"), (b"a", b"a"), (b"aa", b"a")]
    assert learn_merges({"aaaaa": 1}, 3) == [(b"a", b"a"), (b"aa", b"aa"), (b"aaaa", b"a")]


def slow_merges(words: dict[str, int], n_merges: int) -> list[tuple[bytes, bytes]]:
    """The rule as it is told: count all pairs anew, take the greatest of the most frequent, replace it everywhere."""
    table = {word: [bytes((byte,)) for byte in word.encode()] for word in words}
    merges: list[tuple[bytes, bytes]] = []
    while len(merges) < n_merges:
        counts: Counter[tuple[bytes, bytes]] = Counter()
        for word, tokens in table.items():
            for pair in zip(tokens, tokens[1:], strict=False):
                counts[pair] += words[word]
        if not counts:
            break
        left, right = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append((left, right))
        for tokens in table.values():
            place = 0
            while place < len(tokens) - 1:
                if (tokens[place], tokens[place + 1]) == (left, right):
                    tokens[place : place + 2] = [left + right]
                place += 1
    return merges


@pytest.mark.parametrize("rarer", [2, 16])
@settings(deadline=None)
@given(
    words=st.dictionaries(
        st.text("abé東", min_size=1, max_size=14), st.integers(1, 99), min_size=1, max_size=15
    )
)
def test_merges_equal_those_of_the_slow_rule_until_nothing_is_left(rarer, words):
    """However many rare pairs are left out of the heap, to be found again when they are the most frequent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe_fast, "RARER", rarer)
        merges = learn_merges(words, 300)
    assert merges == slow_merges(words, 300)
    assert len({left + right for left, right in merges}) == len(
        merges
    )  # so each is a token of its own


def test_merges_of_a_real_text_equal_those_of_the_slow_rule(small_text):
    words = dict(count_words([small_text[:20_000]], Pretokenizer()))
    assert learn_merges(words, 120) == slow_merges(words, 120)


def learned_by_the_library(text: str, vocab_size: int, pattern: str) -> Backend:
    backend = Backend(models.BPE())
    words = pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([piece for piece in text.split(EOT) if piece], trainer)
    return backend


def test_merges_equal_those_of_another_library_where_no_counts_are_equal():
    """WordTable of one pair each, without a common letter, that stand 1, 2, 4, ... times: the last is the first merge."""
    words = ["ab", "cd", "ef", "gh", "ij", "kl", "mn"]
    text = EOT.join(word for power, word in enumerate(words) for _ in range(2**power))
    theirs = json.loads(learned_by_the_library(text, 264, "gpt2").to_str())["model"]["merges"]
    ours = learn_merges(count_words([text], Pretokenizer(special_tokens=(EOT,))), 7)
    assert (
        [[left.decode(), right.decode()] for left, right in ours]
        == theirs
        == [list(word) for word in reversed(words)]
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_bytes_per_token_are_those_of_another_library_within_a_fifth_of_a_percent(
    small_text, pattern
):
    pretokenizer = Pretokenizer(pattern, (EOT,))
    ours = learn_bpe(text_chunks([small_text]), 1000, pretokenizer).backend()
    theirs = learned_by_the_library(small_text, 1000, pattern)
    pieces = small_text.split(EOT)
    counts = [
        sum(len(encoding.ids) for encoding in backend.encode_batch(pieces))
        for backend in (ours, theirs)
    ]
    assert ours.get_vocab_size() == theirs.get_vocab_size() == 1000
    assert counts[0] == pytest.approx(counts[1], rel=0.002)


def test_130_kb_and_500_tokens_take_well_under_a_second_and_a_half(small_text):
    start = time.process_time()
    learn_bpe(text_chunks([small_text]), 500, Pretokenizer())
    assert time.process_time() - start < 0.75


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@given(
    text=st.text(
        st.one_of(
            st.characters(exclude_categories=["Cn", "Cs"]), st.sampled_from(" \n\r\t'.a1\u3000\x1c")
        ),
        max_size=40,
    )
)
def test_words_are_those_of_the_library_that_will_encode(pattern, text):
    """Else merges would be learned that no text can use. The words, put together, are the text.

    Not for characters that Unicode has added since: which are letters is a matter of a library's version.
    """
    found = Pretokenizer(pattern, special_tokens=()).split(text)
    pieces = pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated").pre_tokenize_str(text)
    assert found == [word for word, _ in pieces]
    assert "".join(found) == text


def test_words_end_at_special_tokens_and_the_longest_of_overlapping_ones_counts():
    pretokenizer = Pretokenizer(special_tokens=("<|a|>", "<|a|><|a|>"))
    assert pretokenizer.split("x<|a|><|a|>y<|a|>z") == ["x", "y", "z"]


def test_no_special_token_or_part_across_one_is_in_a_merge(small_text):
    """`<|endoftext|>` is as frequent as a common word here: without the rule its letters would be merged (E16)."""
    learned = learn_bpe(text_chunks([small_text]), 2000, Pretokenizer())
    assert not [
        token
        for token in learned.vocabulary()
        if ("<|" in token or "|>" in token) and token not in learned.pretokenizer.special_tokens
    ]
    without = learn_bpe(text_chunks([small_text]), 2000, Pretokenizer(special_tokens=("<|none|>",)))
    assert [token for token in without.vocabulary() if "endoftext" in token and token != EOT]


def test_a_file_is_cut_where_no_word_is(file_in_parts, small_text):
    """The words of the parts, 9 whole ones and a rest, are the words of the whole, for both patterns."""
    borders = part_borders(file_in_parts)
    assert len(borders) == 11
    assert borders[0] == 0 and borders[-1] == file_in_parts.stat().st_size
    for pattern in PATTERNS:
        pretokenizer = Pretokenizer(pattern)
        assert count_words_of(
            word_chunks(sources_named([str(file_in_parts)])), pretokenizer
        ) == count_words([small_text], pretokenizer)


def test_a_text_without_any_good_place_is_cut_behind_lines_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "PART_BYTES", 10)
    monkeypatch.setattr(chunks, "WINDOW_BYTES", 8)
    (tmp_path / "a.txt").write_text("東京東京\n" * 3, encoding="utf-8", newline="")
    assert part_borders(tmp_path / "a.txt") == [0, 13, 26, 39]
    (tmp_path / "b.txt").write_text("x" * 100, encoding="utf-8", newline="")
    assert part_borders(tmp_path / "b.txt") == [0, 100]


def test_a_word_that_stands_four_billion_times_is_counted():
    """Counts are held in the smallest type that holds each of them, and added up in a larger one."""
    assert learn_merges({"ab": 2**32 - 1, "cb": 2**32 - 1, "ac": 2**31, "xac": 2**31 + 1}, 1) == [
        (b"a", b"c")
    ]


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_merges(file_in_parts):
    source = sources_named([str(file_in_parts)])
    one, two, four = (
        learn_bpe(word_chunks(source, processes), 1000, Pretokenizer(), processes=processes)
        for processes in (1, 2, 4)
    )
    assert len(one.merges) == 742
    assert one.merges == two.merges == four.merges


def test_a_process_that_counts_loads_little():
    """18 MB instead of 52 each: neither numpy nor pydantic."""
    code = "import sys, tinylm.tokenizer.pretokenize, tinylm.common.processes; print([name for name in ('numpy', 'pydantic', 'tinylm.config.schema') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "[]\n"


class Deadly:
    """A job that ends a process started for it as the system does when memory runs out."""

    size = 1

    def texts(self) -> list[str]:
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return []


@pytest.mark.slow
def test_a_killed_process_is_an_error_and_no_hang(monkeypatch):
    monkeypatch.setattr(bpe_fast, "MIN_SIZE_FOR_PROCESSES", 0)
    with pytest.raises(
        UserError,
        match="a helper process was ended from outside, perhaps for want of memory. Free some, or use fewer processes.$",
    ):
        count_words_of([Deadly()] * 5, Pretokenizer(), processes=2)


def test_a_small_text_starts_no_process(file_in_parts, monkeypatch):
    monkeypatch.setattr(
        "tinylm.common.processes.ProcessPoolExecutor", None
    )  # calling it would fail
    monkeypatch.setattr(bpe_fast, "MIN_SIZE_FOR_PROCESSES", file_in_parts.stat().st_size + 1)
    assert (
        len(
            learn_bpe(
                word_chunks(sources_named([str(file_in_parts)]), 2),
                300,
                Pretokenizer(),
                processes=2,
            ).merges
        )
        == 42
    )


def test_other_kinds_of_files_are_read_by_document(tmp_path):
    """The words of `low low`, without the JSON around it."""
    (tmp_path / "a.jsonl").write_text('{"text": "low low"}\n{"text": "low"}\n', encoding="utf-8")
    assert count_words_of(word_chunks(sources_named([str(tmp_path)])), Pretokenizer()) == {
        "low": 2,
        " low": 1,
    }


def test_a_byte_order_mark_is_no_word(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbflow")
    assert count_words_of(word_chunks(sources_named([str(tmp_path)])), Pretokenizer()) == {"low": 1}


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=PATTERNS)
def folder(request, small_text, tmp_path_factory) -> Path:
    """A tokenizer of 600 tokens, as it is written."""
    pretokenizer = Pretokenizer(request.param)
    path = tmp_path_factory.mktemp("tokenizers") / request.param
    learn_bpe(text_chunks([small_text]), 600, pretokenizer).save(path)
    return path


def test_the_files_are_gpt2s(folder):
    """Ids: 256 bytes, 342 merges in their order, 2 special tokens."""
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert list(vocabulary.values()) == list(range(600))
    assert lines[0] == "#version: 0.2"
    assert [line.replace(" ", "") for line in lines[1:]] == list(vocabulary)[256:598]
    assert list(vocabulary)[598:] == ["<|endoftext|>", "<|pad|>"]


@settings(deadline=None)
@given(text=st.text())
def test_any_text_round_trips_and_no_id_is_special(folder, text):
    tokenizer = load_hf_tokenizer(str(folder))
    for spelled in (text, f"{text}{EOT}{text}"):
        ids = tokenizer.encode(spelled)
        assert tokenizer.decode(ids) == spelled
        assert max(ids, default=0) < 598


def test_our_reader_and_transformers_agree_on_every_id(folder, small_text):
    from transformers import AutoTokenizer

    ours, theirs = load_hf_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    for text in (small_text, "naïve 東京 🙂\r\n\r\n  x\t12345's I'LL <|pad|>", ""):
        assert ours.encode(text) == theirs.encode(text, split_special_tokens=True)
    assert (
        (ours.eos_id, ours.pad_id, ours.vocab_size)
        == (598, 599, 600)
        == (theirs.eos_token_id, theirs.pad_token_id, len(theirs))
    )


def test_vocab_and_merges_alone_give_the_same_ids(tmp_path, small_text):
    pretokenizer = Pretokenizer()
    learn_bpe(text_chunks([small_text]), 600, pretokenizer).save(tmp_path / "new" / "mine")
    whole = load_hf_tokenizer(str(tmp_path / "new" / "mine")).encode(small_text)
    (tmp_path / "new" / "mine" / "tokenizer.json").unlink()
    assert load_hf_tokenizer(str(tmp_path / "new" / "mine")).encode(small_text) == whole


def test_the_end_of_a_text_is_the_special_token_known_for_it_or_the_first():
    assert (
        Bpe((), Pretokenizer(special_tokens=("<pad>", "</s>"))).eos,
        Bpe((), Pretokenizer(special_tokens=("<pad>", "</s>"))).pad,
    ) == ("</s>", "<pad>")
    assert (
        Bpe((), Pretokenizer(special_tokens=("<x>", "<y>"))).eos,
        Bpe((), Pretokenizer(special_tokens=("<x>", "<y>"))).pad,
    ) == ("<x>", None)


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def no_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_disk)
    with pytest.raises(
        UserError,
        match="mine: cannot be written: No space left on device. Free disk space or change the output folder.",
    ):
        Bpe((), Pretokenizer()).save(tmp_path / "mine")
    assert list(tmp_path.iterdir()) == []


# --- what cannot be learned -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocab_size", "special", "message"),
    [
        (
            257,
            ("<|a|>", "<|b|>"),
            "tokenizer.vocab_size: must be at least 258 (256 bytes and 2 special tokens), got 257. Raise it.",
        ),
        (
            300,
            (),
            "special tokens: must be at least one, which ends a text. Name one, such as <|endoftext|>.",
        ),
        (
            300,
            ("a",),
            "special token: a: must be two or more visible characters. Choose another, such as <|endoftext|>.",
        ),
        (
            300,
            ("<a b>",),
            "special token: <a b>: must be two or more visible characters. Choose another, such as <|endoftext|>.",
        ),
        (
            300,
            ("<\x1b>",),
            r"special token: <\x1b>: must be two or more visible characters. Choose another, such as <|endoftext|>.",
        ),
        (300, ("<a>", "<a>"), "special token: <a>: is given twice. Give it once."),
    ],
)
def test_a_vocabulary_that_cannot_be_is_refused_before_the_text_is_read(
    vocab_size, special, message
):
    with pytest.raises(UserError) as caught:
        learn_bpe([], vocab_size, Pretokenizer(special_tokens=special))
    assert str(caught.value) == message


def test_a_special_token_that_is_written_like_another_is_refused():
    """` the` is written Ġthe, so no other token may be."""
    pretokenizer = Pretokenizer(special_tokens=("Ġthe",))
    with pytest.raises(
        UserError,
        match="^special token: Ġthe: another token is written the same way in the files. Choose another name.$",
    ):
        learn_bpe(text_chunks([" the"]), 260, pretokenizer).vocabulary()


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", EOT.encode()])
def test_a_text_without_words_is_an_error(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(
        UserError,
        match="^tokenizer: the text has no words to learn from. Give a file with text.$",
    ):
        learn_bpe(word_chunks(sources_named([str(tmp_path / "a.txt")])), 300, Pretokenizer())


def test_bytes_that_are_not_utf8_are_named_with_their_place(tmp_path):
    """E3: the offset counts from the start of the file, across its parts."""
    (tmp_path / "a.txt").write_bytes(b"a b\n" * 500_000 + b"a\xffb")
    with pytest.raises(
        UserError,
        match="a.txt: not UTF-8 text: byte 0xff at offset 2000001. Save the file as UTF-8.$",
    ):
        learn_bpe(word_chunks(sources_named([str(tmp_path / "a.txt")])), 300, Pretokenizer())


def test_a_text_with_too_few_words_gives_a_smaller_vocabulary(tmp_path, capsys):
    """E15: `low` allows two merges, `a` none."""
    (tmp_path / "a.txt").write_text("low low", encoding="utf-8")
    assert (
        main(
            [
                "tokenizer",
                "train",
                "--data",
                str(tmp_path / "a.txt"),
                "--out",
                str(tmp_path / "mine"),
                "--vocab-size",
                "1000",
            ]
        )
        == 0
    )
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path}/mine\n"
    assert (
        "vocabulary: 260 tokens instead of 1000: every word of this text is already one token\n"
        in shown.err
    )
    assert load_hf_tokenizer(str(tmp_path / "mine")).vocab_size == 260
    assert learn_merges({"a": 5}, 10) == []


def test_a_pipe_that_a_glob_matches_is_not_read(tmp_path):
    """E8: reading it would wait for ever."""
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(
        UserError, match="a.txt: not a regular file. Give the path of a file on disk.$"
    ):
        learn_bpe(word_chunks(sources_named([str(tmp_path / "*.txt")])), 300, Pretokenizer())


# --- the commands -----------------------------------------------------------------------------------------------------


def test_train_does_not_replace_what_is_there(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "vocab.json").write_text("{}", encoding="utf-8")
    assert (
        main(
            [
                "tokenizer",
                "train",
                "--data",
                "nowhere.txt",
                "--out",
                str(tmp_path / "mine"),
                "--vocab-size",
                "1000",
            ]
        )
        == 2
    )
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path}/mine: already exists. Delete it, or choose another folder.\n"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["--processes", "0"],
            "error: --processes: must be at least 1, got 0. Give a whole number from 1.\n",
        ),
        (
            ["--vocab-size", "9"],
            "error: --vocab-size: must be at least 257 (256 bytes and 1 special token), got 9. Raise it.\n",
        ),
        (
            ["--data", "no.txt"],
            "error: --data: no.txt: not found. Give a file, a folder, a glob, or a dataset on the hub written hf:owner/name.\n",
        ),
    ],
)
def test_train_names_what_is_wrong(tmp_path, capsys, change, message):
    given = [
        "--data",
        str(ROOT / "data/tiny_corpus.txt"),
        "--out",
        str(tmp_path / "mine"),
        "--vocab-size",
        "300",
    ]
    assert main(["tokenizer", "train", *given, *change]) == 2
    assert capsys.readouterr().err == message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["--vocab-size", "100000000000"],
            "--vocab-size: must be at most 2147483647, got 100000000000. Lower it, for example to 32000.",
        ),
        (
            ["--special", "a"],
            "--special: a: must be two or more visible characters. Choose another, such as <|endoftext|>.",
        ),
        (["--docs", "0"], "--docs: must be at least 1, got 0. Give a whole number from 1."),
        (["--separator", ""], "--separator: is empty. Give the text that separates documents."),
        (
            ["--text-field", "body"],
            "a.jsonl:1: body: missing; the row has text. Correct the row, or set --text-field to the key that holds the text.",
        ),
        (
            ["--out", "a.jsonl/mine"],
            "a.jsonl/mine: cannot be written: File exists. Free disk space or change --out.",
        ),
        (
            ["--out", "a.jsonl/b/mine"],
            "a.jsonl/b/mine: cannot be written: Not a directory. Free disk space or change --out.",
        ),
    ],
)
def test_train_names_the_flag_before_it_learns(tmp_path, capsys, monkeypatch, change, message):
    """All but the row are known before any word is counted: with a count that fails the messages are the same."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"text": "low low"}\n', encoding="utf-8")
    if "--text-field" not in change:
        monkeypatch.setattr(bpe_fast, "count_words_of", None)
    given = ["--data", "a.jsonl", "--out", "mine", "--vocab-size", "300"]
    assert main(["tokenizer", "train", *given, *change]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_size_that_no_text_allows_takes_no_memory():
    """The sizes of two billion tokens would be 8 GB; `low` and the borders of it are five bytes, and allow two merges."""
    assert len(WordTable({"low": 2}, 2**31 - 1).sizes) == 256 + 5
    assert len(learn_merges({"low": 2}, 2**31 - 300)) == 2


def learned(tmp_path: Path, *flags: str) -> list[str]:
    """The merges that `tokenizer train` writes, `l ow` for example."""
    assert (
        main(["tokenizer", "train", "--out", str(tmp_path / "mine"), "--vocab-size", "270", *flags])
        == 0
    )
    return (tmp_path / "mine" / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]


def test_train_reads_documents_as_encode_does(tmp_path, monkeypatch):
    """A column of another name; the first documents alone; texts between separators, whose letters are in no merge."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"body": "low"}\n{"body": "abab"}\n', encoding="utf-8")
    assert learned(tmp_path / "1", "--data", "a.jsonl", "--text-field", "body", "--docs", "1") == [
        "o w",
        "l ow",
    ]
    Path("a.txt").write_text("low##low##abab", encoding="utf-8")
    assert learned(tmp_path / "2", "--data", "a.txt", "--separator", "##", "--docs", "2") == [
        "o w",
        "l ow",
    ]
    assert learned(tmp_path / "3", "--data", "a.txt", "--separator", "##") == [
        "o w",
        "l ow",
        "a b",
        "ab ab",
    ]
    assert "# #" in learned(tmp_path / "4", "--data", "a.txt")


@pytest.fixture
def stream(monkeypatch) -> list[tuple]:
    """A dataset on the hub with documents without end in `body`; what was asked for."""
    asked: list[tuple] = []

    class Stream:
        column_names = None

        def __iter__(self):
            yield {"body": "low"}
            while True:
                yield {"body": "abab"}

    def serve(name: str, config: str | None, *, split: str, streaming: bool) -> Stream:
        asked.append((name, config, split, streaming))
        return Stream()

    monkeypatch.setattr("datasets.load_dataset", serve)
    monkeypatch.setattr("tinylm.text.sources.require_hub", lambda what, mend: None)
    return asked


def test_train_and_compare_take_a_dataset_on_the_hub(tmp_path, stream, capsys):
    """Three documents: `low` and `abab` twice, 11 bytes."""
    given = ("--data", "hf:owner/name:en:validation", "--text-field", "body", "--docs", "3")
    assert learned(tmp_path, *given) == ["a b", "ab ab", "o w", "l ow"]
    assert main(["tokenizer", "compare", "byte", *given]) == 0
    *_, row = capsys.readouterr().out.splitlines()
    assert row.split()[2] == "11"
    assert stream == [("owner/name", "en", "validation", True)] * 2


def test_a_stream_that_breaks_off_while_learning_is_to_be_tried_again(
    tmp_path, monkeypatch, capsys
):
    """Nothing is kept, so that nothing is said of going on."""

    def broken(*args, **kwargs):
        yield {"text": "low"}
        raise OSError("cable")

    class Stream:
        column_names, __iter__ = None, broken

    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: Stream())
    monkeypatch.setattr("tinylm.text.sources.require_hub", lambda what, mend: None)
    assert (
        main(
            [
                "tokenizer",
                "train",
                "--data",
                "hf:owner/name",
                "--out",
                str(tmp_path / "mine"),
                "--vocab-size",
                "300",
            ]
        )
        == 2
    )
    assert (
        capsys.readouterr().err == "error: owner/name (train): reading stopped: cable. Try again.\n"
    )


def test_show_prints_tokens_and_ids_and_no_escape(tmp_path, capsys):
    r"""`low` is token 257 (o w, then l ow); `é` two bytes; the escape of the user's text is shown, not sent."""
    learn_bpe(text_chunks(["low", "low"]), 260, Pretokenizer()).save(tmp_path / "mine")
    assert main(["tokenizer", "show", str(tmp_path / "mine"), "lowé[b]\x1b"]) == 0
    assert (
        capsys.readouterr().out
        == "low|\\xc3|\\xa9|[|b|]|\\x1b\n257 195 169 91 98 93 27\n7 tokens, 9 bytes, 1.29 bytes per token\n"
    )


def test_compare_prints_a_table(tmp_path, capsys):
    """`low low`: 7 bytes in 3 tokens (low, space, low); 2 of 260 are used."""
    learn_bpe(text_chunks(["low", "low"]), 260, Pretokenizer()).save(tmp_path / "mine")
    (tmp_path / "a.txt").write_text("low low", encoding="utf-8")
    assert (
        main(
            [
                "tokenizer",
                "compare",
                str(tmp_path / "mine"),
                "byte",
                "--data",
                str(tmp_path / "a.txt"),
            ]
        )
        == 0
    )
    text, _, *rows = capsys.readouterr().out.splitlines()
    assert text == f"text: {tmp_path / 'a.txt'}"
    assert [row.split()[1:] for row in rows] == [
        ["260", "3", "2.333", "2", "(1%)", "'low'", "'", "'"],
        ["260", "7", "1.000", "4", "(2%)", "'", "'", "'l'", "'o'"],
    ]


def test_compare_shows_those_it_has_and_names_each_that_it_has_not(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("low low", encoding="utf-8")
    assert (
        main(["tokenizer", "compare", "./none", "byte", "./nor", "--data", str(tmp_path / "a.txt")])
        == 2
    )
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == ["text:", "tokenizer", "byte"]
    mend = "not found. Give a folder with tokenizer.json, or a Hugging Face name such as gpt2."
    assert shown.err == f"error: TOKENIZER: ./none: {mend}\nerror: TOKENIZER: ./nor: {mend}\n"
    assert main(["tokenizer", "compare", "./none", "--data", str(tmp_path / "a.txt")]) == 2
    assert capsys.readouterr().out == ""


def test_show_names_its_argument(capsys):
    assert main(["tokenizer", "show", "./none", "text"]) == 2
    assert capsys.readouterr().err.startswith("error: TOKENIZER: ./none: not found. Give a folder")


def test_compare_without_text_is_an_error(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("", encoding="utf-8")
    assert main(["tokenizer", "compare", "byte", "--data", str(tmp_path / "a.txt")]) == 2
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path}/a.txt: contains no text. Give a file with text.\n"
    )


def test_fit_counts_bytes_tokens_and_used_ones():
    fit = measure_fit(make_tokenizer(TokenizerConfig(), list), ["aé", "a"])
    assert (fit.n_bytes, fit.n_tokens, fit.n_used, fit.longest) == (4, 4, 3, [97, 169, 195])


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_ctrl_c_leaves_nothing(small_text, tmp_path, processes):
    """Of a corpus of half a gigabyte: no half folder; the program says what stopped it."""
    (tmp_path / "text.txt").write_text(small_text * 40, encoding="utf-8", newline="")
    command = [
        sys.executable,
        "-m",
        "tinylm",
        "tokenizer",
        "train",
        "--data",
        *[str(tmp_path / "text.txt")] * 100,
    ]
    command += ["--out", str(tmp_path / "mine"), "--vocab-size", "30000", "--processes", processes]
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as program:
        time.sleep(2.5)
        os.killpg(program.pid, signal.SIGINT)
        error = program.communicate(timeout=30)[1]
    assert (program.returncode, error, [path.name for path in tmp_path.iterdir()]) == (
        130,
        "\nstopped by Ctrl-C\n",
        ["text.txt"],
    )


# --- the tokenizer of a run -------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path) -> DataConfig:
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"the newest widest lowest {n}"}) + "\n" for n in range(200)),
        encoding="utf-8",
    )
    return DataConfig(dataset=str(tmp_path / "text.jsonl"), cache_dir=str(tmp_path / "cache"))


def cached(data: DataConfig) -> list[Path]:
    return sorted(path for path in Path(data.cache_dir).glob("bpe-*"))


def test_a_run_learns_from_its_training_split_once(data, monkeypatch):
    config = TokenizerConfig(kind="bpe", vocab_size=280)
    first = tokenizer_for(config, data, seed=1)
    assert first.vocab_size == 280
    monkeypatch.setattr(bpe_fast, "count_words_of", None)  # a second learning would fail
    assert tokenizer_for(config, data, seed=1).fingerprint == first.fingerprint
    assert tokenizer_from_plain(first.to_plain()).encode("the lowest") == first.encode("the lowest")


def test_what_was_learned_is_kept_by_the_content_and_the_settings(data):
    config = TokenizerConfig(kind="bpe", vocab_size=280)
    tokenizer_for(config, data, seed=1)
    other_place = Path(data.dataset).rename(Path(data.dataset).with_name("moved.jsonl"))
    moved = data.model_copy(update={"dataset": str(other_place)})
    tokenizer_for(config, moved, seed=1)
    assert len(cached(data)) == 1
    for changed in ({"vocab_size": 281}, {"pattern": "gpt4"}, {"learn_docs": 5}):
        tokenizer_for(config.model_copy(update=changed), moved, seed=1)
    tokenizer_for(config, moved, seed=2)  # which documents are held out
    tokenizer_for(config, moved.model_copy(update={"train_docs": 7}), seed=1)
    with open(other_place, "a", encoding="utf-8") as file:
        file.write('{"text": "one more document of the training split"}\n')
    tokenizer_for(config, moved, seed=1)
    assert len(cached(data)) == 7


def test_learn_docs_bounds_what_is_read(tmp_path):
    """Of `ab` ten times and `cd` after it, the first ten documents know `ab` alone: one merge."""
    (tmp_path / "a.jsonl").write_text(
        '{"text": "ab"}\n' * 10 + '{"text": "cd"}\n' * 90, encoding="utf-8"
    )
    data = DataConfig(
        dataset=str(tmp_path / "a.jsonl"),
        cache_dir=str(tmp_path / "cache"),
        val_dataset=str(tmp_path / "a.jsonl"),
    )
    assert (
        tokenizer_for(
            TokenizerConfig(kind="bpe", vocab_size=300, learn_docs=10), data, seed=1
        ).vocab_size
        == 259
    )
    assert (
        tokenizer_for(TokenizerConfig(kind="bpe", vocab_size=300), data, seed=1).vocab_size == 260
    )


def test_a_stream_without_end_is_not_read_for_its_words():
    data = DataConfig(
        dataset="nobody/nothing", streaming=True, val_docs=10, val_dataset="nobody/else"
    )
    with pytest.raises(
        UserError,
        match="^tokenizer.learn_docs: kind bpe would read all of a streamed dataset. Set tokenizer.learn_docs, for example to 100000.$",
    ):
        tokenizer_for(TokenizerConfig(kind="bpe", vocab_size=300), data, seed=1)


def test_other_kinds_are_made_as_ever(data):
    assert tokenizer_for(TokenizerConfig(), data, seed=1).kind == "byte"
    assert tokenizer_for(TokenizerConfig(kind="char"), data, seed=1).kind == "char"
    with pytest.raises(ValueError, match="kind bpe is learned"):
        make_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), list)


def test_printable_form_is_gpt2s():
    assert gpt2_form(b" a\n\xff") == "ĠaĊÿ"


def test_line_ends_from_windows_are_learned_as_they_are_encoded(tmp_path):
    """Documents lose the \\r of their line ends, so a merge with it would be a token that no text ever has."""
    text = "hello there\nhow are you\n" * 50
    learned = []
    for name, ends in (("unix.txt", "\n"), ("windows.txt", "\r\n")):
        (tmp_path / name).write_bytes(text.replace("\n", ends).encode())
        learned.append(
            learn_bpe(
                word_chunks(sources_named([str(tmp_path / name)])), 300, Pretokenizer()
            ).merges
        )
    assert learned[0] == learned[1]
