"""The files of a learned vocabulary, and requests for one that are refused."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tinylm.common.errors import UserError
from tinylm.text.documents import text_chunks
from tinylm.tokenizer.bpe_fast import learn_bpe
from tinylm.tokenizer.bpe_files import Bpe
from tinylm.tokenizer.factory import tokenizer_from_plain
from tinylm.tokenizer.hf_files import load_hf_tokenizer
from tinylm.tokenizer.pretokenize import PATTERNS, Pretokenizer

EOT = "<|endoftext|>"
FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json")


# Up to three words as one, digits apart; what it does not match is a word of its own.
OWN = r"(?: ?\p{L}+){1,3}|\p{N}|\s+"


@pytest.fixture(scope="module", params=[*PATTERNS, OWN], ids=[*PATTERNS, "own"])
def folder(request, small_text, tmp_path_factory) -> Path:
    """The files of a tokenizer of 600 tokens."""
    pretokenizer = Pretokenizer(request.param)
    path = tmp_path_factory.mktemp("tokenizers") / "mine"
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


@pytest.mark.slow
@settings(deadline=None)
@given(text=st.text())
def test_any_text_round_trips_and_no_id_is_special(folder, text):
    tokenizer = load_hf_tokenizer(str(folder))
    for spelled in (text, f"{text}{EOT}{text}"):
        ids = tokenizer.encode(spelled)
        assert tokenizer.decode(ids) == spelled
        assert max(ids, default=0) < 598


def test_transformers_reads_the_same_tokenizer(folder, small_text):
    from transformers import AutoTokenizer

    ours, theirs = load_hf_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    for text in (small_text, "naïve 東京 🙂\r\n\r\n  x\t12345's I'LL <|pad|>", ""):
        assert ours.encode(text) == theirs.encode(text, split_special_tokens=True)
    assert (
        (ours.eos_id, ours.pad_id, ours.vocab_size)
        == (598, 599, 600)
        == (theirs.eos_token_id, theirs.pad_token_id, len(theirs))
    )


@pytest.mark.slow
def test_a_regular_expression_is_in_tokenizer_json_and_the_ids_are_the_librarys(
    tmp_path, small_text
):
    """Built in the library alone from the two files, with the same expression: equal ids. Two words
    of letters are one token, as no named pattern allows. The checkpoint's form reads back.
    """
    learn_bpe(text_chunks([small_text]), 600, Pretokenizer(OWN)).save(tmp_path / "mine")
    ours = load_hf_tokenizer(str(tmp_path / "mine"))
    theirs = Backend(
        models.BPE.from_file(str(tmp_path / "mine/vocab.json"), str(tmp_path / "mine/merges.txt"))
    )
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(OWN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    stored = json.loads((tmp_path / "mine/tokenizer.json").read_text(encoding="utf-8"))
    assert stored["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": OWN}
    assert ours.encode(small_text) == theirs.encode(small_text).ids
    assert any(" " in ours.token_text(id).strip() for id in range(256, 598))
    assert tokenizer_from_plain(ours.to_plain()).encode(small_text) == ours.encode(small_text)


def test_vocab_and_merges_alone_give_the_same_ids(tmp_path, small_text):
    pretokenizer = Pretokenizer()
    learn_bpe(text_chunks([small_text]), 600, pretokenizer).save(tmp_path / "new" / "mine")
    whole = load_hf_tokenizer(str(tmp_path / "new" / "mine")).encode(small_text)
    (tmp_path / "new" / "mine" / "tokenizer.json").unlink()
    assert load_hf_tokenizer(str(tmp_path / "new" / "mine")).encode(small_text) == whole


def test_eos_is_a_well_known_special_token_or_the_first():
    known = Bpe((), Pretokenizer(special_tokens=("<pad>", "</s>")))
    assert (known.eos, known.pad) == ("</s>", "<pad>")
    unknown = Bpe((), Pretokenizer(special_tokens=("<x>", "<y>")))
    assert (unknown.eos, unknown.pad) == ("<x>", None)


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
def test_an_impossible_vocabulary_is_refused_before_the_text_is_read(vocab_size, special, message):
    with pytest.raises(UserError) as caught:
        learn_bpe([], vocab_size, Pretokenizer(special_tokens=special))
    assert str(caught.value) == message


def test_a_special_token_that_is_written_like_another_is_refused():
    """The token ` the` is written Ġthe."""
    pretokenizer = Pretokenizer(special_tokens=("Ġthe",))
    with pytest.raises(
        UserError,
        match="^special token: Ġthe: another token is written the same way in the files. Choose another name.$",
    ):
        learn_bpe(text_chunks([" the"]), 260, pretokenizer).vocabulary()
