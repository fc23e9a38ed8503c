"""Tokenizers: ids that are known, round trips of any text, text that spells special tokens, damaged files."""

import itertools
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from huggingface_hub.utils import httpx
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend

from tinylm.common.errors import UserError
from tinylm.common.hub import is_hub_name
from tinylm.config.schema import TokenizerConfig
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.byte_char import ByteTokenizer, CharTokenizer
from tinylm.tokenizer.factory import make_tokenizer, tokenizer_from_plain
from tinylm.tokenizer.hf import BYTE_OF_CHARACTER, HFTokenizer

TEXT = "the model reads a token and guesses the next token; naïve 東京 🙂 text, the the the model's guesses\n"


def load(path: Path) -> Tokenizer:
    return make_tokenizer(TokenizerConfig(path=str(path)))


def byte_level_backend() -> Backend:
    """GPT-2's construction, learned from one sentence."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials, alphabet = ["<|endoftext|>", "<|pad|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    return backend


def byte_fallback_backend() -> Backend:
    """Llama's construction: ▁ for a space, and bytes such as <0xE2> for characters that have no token."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdeghlmnoprstux",
        "th",
        "the",
        "▁the",
        "é",
    ]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    backend = Backend(
        models.BPE(
            {piece: id for id, piece in enumerate(pieces)},
            merges,
            unk_token=pieces[0],
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def word_backend() -> Backend:
    """A vocabulary of words that has its special tokens as words too."""
    backend = Backend(models.WordLevel({"[UNK]": 0, "[EOS]": 1, "the": 2, "model": 3}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["[UNK]", "[EOS]"])
    return backend


def unigram_backend() -> Backend:
    """SentencePiece's Unigram, whose search finds </s> in the vocabulary whatever `encode_special_tokens` says."""
    scores = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((c, -3.0) for c in "</s>abc")]
    backend = Backend(models.Unigram(scores, 0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "</s>"])
    return backend


BYTE_LEVEL = HFTokenizer(byte_level_backend(), eos="<|endoftext|>", pad="<|pad|>")
BYTE_FALLBACK = HFTokenizer(byte_fallback_backend(), eos="</s>", pad=None)
WORDS = HFTokenizer(word_backend(), eos="[EOS]", pad=None)
UNIGRAM = HFTokenizer(unigram_backend(), eos="</s>", pad=None)
CHARACTERS = CharTokenizer(TEXT, unknown="unk")
ALL = {
    "byte": ByteTokenizer(),
    "char": CHARACTERS,
    "byte_level": BYTE_LEVEL,
    "byte_fallback": BYTE_FALLBACK,
    "words": WORDS,
    "unigram": UNIGRAM,
}
every_tokenizer = pytest.mark.parametrize("tokenizer", ALL.values(), ids=ALL.keys())

SPECIALS = [
    "<|endoftext|>",
    "<|pad|>",
    "<|eos|>",
    "<|bos|>",
    "<|sep|>",
    "<|unk|>",
    "</s>",
    "<s>",
    "<unk>",
    "[EOS]",
    "[UNK]",
]
texts_with_specials = st.lists(
    st.one_of(
        st.sampled_from(SPECIALS),
        st.sampled_from([" ", "the", "<", "|", "/s>"]),
        st.text(max_size=3),
    )
).map("".join)


# --- known ids --------------------------------------------------------------------------------------------------------


def test_bytes_are_ids_and_four_specials_follow():
    tokenizer = ByteTokenizer()
    assert (
        tokenizer.vocab_size,
        tokenizer.pad_id,
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.sep_id,
    ) == (260, 256, 257, 258, 259)
    assert tokenizer.encode("Aé") == [0x41, 0xC3, 0xA9]
    assert tokenizer.decode([256, 257, 0x41, 258, 0xC3, 0xA9, 259]) == "Aé"


def test_character_ids_follow_the_code_points_of_the_training_documents():
    """b < z < é < 東 by code point, whatever the order in the text; <|pad|> and <|eos|> come next."""
    tokenizer = CharTokenizer.of_documents(["zé", "b東b"], unknown="error")
    assert tokenizer.encode("bzé東") == [0, 1, 2, 3]
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size) == (4, 5, 6)
    assert tokenizer.special_names == {4: "<|pad|>", 5: "<|eos|>"}


def test_an_unknown_character_is_an_error_that_names_it_and_its_place():
    tokenizer = CharTokenizer("abc", unknown="error")
    with pytest.raises(UserError) as caught:
        tokenizer.encode("ab\x1bé")
    assert str(caught.value) == (
        r"position 2: the character '\x1b' (U+001B) is not one of the 3 characters of the "
        r"tokenizer. Set tokenizer.unknown: unk, or train on text that contains it."
    )


def test_an_unknown_character_is_unk_where_that_was_asked_for():
    tokenizer = CharTokenizer.of_documents(["abc"], unknown="unk")
    assert tokenizer.encode("axb") == [0, 5, 1]
    assert (tokenizer.decode([0, 5, 1]), tokenizer.token_text(5), tokenizer.byte_lengths()) == (
        "a\ufffdb",
        "<|unk|>",
        [1, 1, 1, 0, 0, 0],
    )


def test_a_character_vocabulary_of_nothing_is_an_error():
    with pytest.raises(
        UserError,
        match="tokenizer.kind: char learns its vocabulary from the training documents, but they are empty",
    ):
        CharTokenizer.of_documents([], unknown="error")


def test_the_printable_form_of_bytes_is_gpt2s():
    """Known from GPT-2's vocab.json: Ġ is a space, Ċ a newline, and all 256 bytes have one character each."""
    assert (BYTE_OF_CHARACTER["Ġ"], BYTE_OF_CHARACTER["Ċ"], BYTE_OF_CHARACTER["a"]) == (
        b" ",
        b"\n",
        b"a",
    )
    assert set(BYTE_OF_CHARACTER) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTE_OF_CHARACTER.values()) == [bytes((byte,)) for byte in range(256)]


# --- any text ---------------------------------------------------------------------------------------------------------


@given(st.text())
def test_any_text_round_trips_through_bytes(text):
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text


@given(st.text())
def test_any_text_round_trips_through_byte_level_bpe(text):
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text)) == text


@pytest.mark.parametrize(
    "tokenizer",
    [ByteTokenizer(), BYTE_LEVEL, BYTE_FALLBACK],
    ids=["byte", "byte_level", "byte_fallback"],
)
@pytest.mark.parametrize(
    "text",
    [
        "a\r\nb\r",
        "\0a\0",
        "a\u2028b\u2029c\x85",
        "\ufeffa\ufeff",
        "\x1c\x1d\v\f",
        "e\u0301 \u00e9",
        "\U0010ffff\uffff",
    ],
)
def test_characters_that_programs_often_change_round_trip(tokenizer, text):
    """E3: CRLF, NUL, the line ends of Unicode, a byte-order mark, separators, two ways to write é,
    and no characters at all.
    """
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(alphabet=st.characters(exclude_characters="▁", exclude_categories=["Cs"])))
def test_any_text_round_trips_through_byte_fallback(text):
    """▁ is that construction's own sign for a space, so it is the only character that does not round-trip."""
    assert BYTE_FALLBACK.decode(BYTE_FALLBACK.encode(text)) == text


@given(st.text(min_size=1))
def test_any_text_round_trips_through_its_own_characters(text):
    tokenizer = CharTokenizer(text, unknown="error")
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
@every_tokenizer
@given(text=texts_with_specials)
def test_text_never_becomes_a_special_token(tokenizer, text):
    """An unknown word or character may become the unknown token: that is its purpose."""
    unknown = {"<|unk|>", "[UNK]", "<unk>"}
    assert [
        tokenizer.special_names[id]
        for id in tokenizer.encode(text)
        if id in tokenizer.special_names and tokenizer.special_names[id] not in unknown
    ] == []


@pytest.mark.slow
@given(texts_with_specials)
def test_text_that_spells_special_tokens_round_trips(text):
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text)) == text


def test_the_backend_alone_would_let_text_become_the_end():
    """What the two tests above guard against: without the cut, Unigram and WordLevel find their
    special tokens in text.
    """
    for tokenizer, text in ((UNIGRAM, "a</s>b"), (WORDS, "the [EOS] model")):
        assert tokenizer.eos_id in tokenizer._backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.eos_id not in tokenizer.encode(text)


def test_text_that_spells_a_special_token_is_encoded_as_any_text(tmp_path):
    """`<|` is a merge here: cutting the text after its first character, as only lookup models need, would lose it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    write_json(
        tmp_path / "vocab.json",
        {token: id for id, token in enumerate([*alphabet, "<|", "<|endoftext|>"])},
    )
    (tmp_path / "merges.txt").write_text("< |\n", encoding="utf-8")
    assert load(tmp_path).encode("<|endoftext|>") == [
        256,
        *(alphabet.index(c) for c in "endoftext|>"),
    ]


def test_an_added_token_that_is_not_special_stays_part_of_the_text():
    backend = byte_level_backend()
    backend.add_tokens([AddedToken("<think>", special=False)])
    tokenizer = HFTokenizer(backend, eos="<|endoftext|>", pad=None)
    think = backend.token_to_id("<think>")
    assert think in tokenizer.encode("a<think>b")
    assert tokenizer.decode(tokenizer.encode("a<think>b")) == "a<think>b"
    assert (tokenizer.byte_lengths()[think], tokenizer.token_text(think)) == (7, "<think>")


def test_an_eos_that_its_files_did_not_call_special_is_special_here():
    backend = byte_level_backend()
    backend.add_tokens([AddedToken("<end>", special=False)])
    tokenizer = HFTokenizer(backend, eos="<end>", pad=None)
    assert tokenizer.eos_id not in tokenizer.encode("a<end>b")
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eos_id]) == "a"


def test_a_special_token_of_one_character_that_a_text_has_is_an_error():
    backend = Backend(models.WordLevel({"a": 0, "$": 1}, None))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(
        UserError, match=r"the character '\$' is a special token, so no text can contain it"
    ):
        HFTokenizer(backend, eos="$", pad=None).encode("a $")


@every_tokenizer
def test_a_lone_surrogate_is_an_error(tokenizer):
    with pytest.raises(
        UserError, match=r"the lone surrogate \\ud800 at position 2, which is half a character"
    ):
        tokenizer.encode("ab\ud800")


@every_tokenizer
def test_no_text_is_no_ids(tokenizer):
    assert (tokenizer.encode(""), tokenizer.encode_batch([]), tokenizer.decode([])) == ([], [], "")


@every_tokenizer
@given(texts=st.lists(texts_with_specials, max_size=4))
@settings(max_examples=20)
def test_a_batch_gives_what_its_texts_give(tokenizer, texts):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


# --- special tokens by name, and streams of text ----------------------------------------------------------------------


@pytest.mark.slow
@every_tokenizer
@settings(deadline=None)
@given(
    parts=st.lists(
        st.one_of(
            st.sampled_from(SPECIALS),
            st.sampled_from(["the model", " ", "<", "|pad|>", "a\n東。"]),
            st.text(max_size=3),
        ),
        max_size=8,
    )
)
def test_allowed_special_tokens_are_their_ids_and_the_rest_is_text(tokenizer, parts):
    """By hand: the text is split at the names, and each stretch between is encoded alone."""
    ids = {name: id for id, name in tokenizer.special_names.items()}
    text = "".join(parts)
    expected = []
    for number, part in enumerate(re.split(f"({'|'.join(map(re.escape, ids))})", text)):
        expected += [ids[part]] if number % 2 else tokenizer.encode(part)
    assert (
        tokenizer.encode(text, allowed_special="all")
        == tokenizer.encode(text, allowed_special=list(ids))
        == expected
    )
    assert list(tokenizer.encode_iterable(parts, allowed_special="all")) == expected


@every_tokenizer
def test_only_the_names_that_are_allowed_are_special(tokenizer):
    name = tokenizer.special_names[tokenizer.eos_id]
    text = "the " + "".join(tokenizer.special_names.values())
    ids = tokenizer.encode(text, allowed_special=[name])
    assert tokenizer.eos_id in ids and tokenizer.eos_id not in tokenizer.encode(text)
    assert [
        id
        for id in ids
        if id in tokenizer.special_names
        and tokenizer.special_names[id] not in (name, "<|unk|>", "[UNK]", "<unk>")
    ] == []


def overlapping() -> HFTokenizer:
    return HFTokenizer(
        byte_level_backend(),
        eos="<|endoftext|>",
        pad=None,
        special=["<|endoftext|><|endoftext|>", "<|e"],
    )


def test_of_special_tokens_that_overlap_the_longest_wins():
    """CS336's rule: of three ends of text in a row, the first two are the token that is both; `<|e`
    is inside and never seen.
    """
    tokenizer = overlapping()
    ids = {name: id for id, name in tokenizer.special_names.items()}
    eot = "<|endoftext|>"
    expected = [
        ids[eot + eot],
        ids[eot],
        *tokenizer.encode("a"),
        ids["<|e"],
        *tokenizer.encode("nd"),
    ]
    assert tokenizer.encode(f"{eot}{eot}{eot}a<|end", allowed_special="all") == expected


@pytest.mark.slow
@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 20)))
def test_special_tokens_are_found_wherever_a_stream_is_cut(sizes):
    tokenizer = overlapping()
    text = "a <|e<|endoftext|><|endoftext|><|endoftext|>x<|endoftext|><|endoftex<|e"
    cuts = [0, *itertools.accumulate(sizes)]
    parts = [text[start:stop] for start, stop in itertools.pairwise(cuts)] + [text[cuts[-1] :]]
    assert list(tokenizer.encode_iterable(parts, allowed_special="all")) == tokenizer.encode(
        text, allowed_special="all"
    )


@every_tokenizer
def test_a_name_that_is_no_special_token_is_a_mistake_of_the_caller(tokenizer):
    """A string is a collection of its characters, which are none."""
    for allowed in (["<|none|>"], "<|endoftext|>"):
        with pytest.raises(
            ValueError,
            match=f"allowed_special: '{re.escape(allowed[0])}' is not a special token of this tokenizer, which has ",
        ):
            tokenizer.encode("a", allowed_special=allowed)
        with pytest.raises(ValueError, match="is not a special token of this tokenizer"):
            list(tokenizer.encode_iterable([], allowed_special=allowed))


@pytest.mark.slow
@every_tokenizer
@settings(deadline=None)
@given(
    texts=st.lists(
        st.one_of(texts_with_specials, st.sampled_from(["the model ", " \n", "東京。", "<think>"])),
        max_size=12,
    )
)
def test_a_stream_has_the_ids_of_the_whole_text(tokenizer, texts):
    """Encoded 4 characters at a time, where that is possible."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinylm.tokenizer.base.STREAM_CHARACTERS", 4)
        assert list(tokenizer.encode_iterable(texts)) == tokenizer.encode("".join(texts))


def test_a_tokenizer_whose_words_are_not_known_is_given_the_whole_stream():
    """Two tokens that strip spaces around them, or have a place to cut inside, would be seen or not
    by where the text is cut.
    """
    assert BYTE_LEVEL.last_cut("a b") == 1
    assert [tokenizer.last_cut("a b") for tokenizer in (BYTE_FALLBACK, WORDS, UNIGRAM)] == [0, 0, 0]
    for token in (
        AddedToken("<x>", lstrip=True, special=False),
        AddedToken("<x y>", special=False),
    ):
        backend = byte_level_backend()
        backend.add_tokens([token])
        assert HFTokenizer(backend, eos="<|endoftext|>", pad=None).last_cut("a b") == 0


MEMORY_OF_A_STREAM = """
import resource, sys
from tinylm.tokenizer.factory import named_tokenizer

def bounded(more):
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + more, -1))

tokenizer = named_tokenizer(sys.argv[1])
with open(sys.argv[2], encoding="utf-8", newline="") as file:
    bounded(1_000_000)
    n = digest = 0
    for id in tokenizer.encode_iterable(file, allowed_special="all"):
        n, digest = n + 1, (digest * 31 + id) % 2**61
print(n, digest)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists("/proc/self/statm"), reason="asks Linux how much memory a process has"
)
def test_5_mb_are_encoded_within_1_mb_of_memory(folder, tmp_path):
    """CS336's rule, measured as there: the process may grow by a megabyte, and the ids are those of the whole."""
    path = tmp_path / "text.txt"
    half = TEXT * (2_500_000 // len(TEXT.encode()))
    text = f"{half}<|endoftext|>{half}"
    path.write_text(text, encoding="utf-8", newline="")
    command = [sys.executable, "-c", MEMORY_OF_A_STREAM, str(folder), str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    digest = 0
    ids = load(folder).encode(text, allowed_special="all")
    for id in ids:
        digest = (digest * 31 + id) % 2**61
    assert done.stdout == f"{len(ids)} {digest}\n"


def test_post_processing_and_truncation_of_a_published_tokenizer_are_off():
    """Else a document would be cut at 4 tokens and get a <|pad|> in front; this program alone adds special tokens."""
    backend = byte_level_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.post_processor = processors.TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", 1)]
    )
    assert HFTokenizer(backend, eos="<|endoftext|>", pad=None).encode(TEXT) == BYTE_LEVEL.encode(
        TEXT
    )


# --- ids back to text -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@every_tokenizer
@given(data=st.data())
def test_a_stream_gives_what_decode_gives(tokenizer, data):
    """Any ids, half characters and special tokens among them."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    stream = tokenizer.stream()
    assert "".join([*map(stream.feed, ids), stream.finish()]) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    "tokenizer",
    [ByteTokenizer(), BYTE_LEVEL, BYTE_FALLBACK],
    ids=["byte", "byte_level", "byte_fallback"],
)
@given(text=st.text(alphabet=st.sampled_from("the é東🙂👩\u200d ")))
def test_a_stream_never_shows_half_a_character(tokenizer, text):
    stream = tokenizer.stream()
    shown = ""
    for id in tokenizer.encode(text):
        shown += stream.feed(id)
        assert text.startswith(shown)
    assert shown + stream.finish() == text


def test_a_stream_shows_each_character_with_its_last_byte():
    stream = ByteTokenizer().stream()
    assert [stream.feed(byte) for byte in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]


def test_a_cut_off_stream_ends_in_the_replacement_character():
    for tokenizer, ids in (
        (ByteTokenizer(), [0x61, 0xE2, 0x82]),
        (BYTE_FALLBACK, [*BYTE_FALLBACK.encode("a"), 3 + 0xE2]),
    ):
        stream = tokenizer.stream()
        assert ("".join(map(stream.feed, ids)), stream.finish()) == ("a", "\ufffd")


@pytest.mark.parametrize(
    "tokenizer", [BYTE_FALLBACK, UNIGRAM, WORDS], ids=["byte_fallback", "unigram", "words"]
)
def test_a_long_stream_forgets_its_beginning_and_stays_right(tokenizer):
    """Every fourth id is one of the last three, so that runs of bytes end."""
    n = tokenizer.vocab_size
    ids = [n - 1 - i % 3 if i % 4 == 0 else (7 * i * i) % n for i in range(500)]
    stream = tokenizer.stream()
    assert "".join([*map(stream.feed, ids), stream.finish()]) == tokenizer.decode(ids)
    assert len(stream._ids) < 100


@pytest.mark.slow
@given(ids=st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1)))
def test_byte_level_decoding_is_the_librarys(ids):
    assert BYTE_LEVEL.decode(ids) == BYTE_LEVEL._backend.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("id", [-1, 260])
def test_an_id_outside_the_vocabulary_is_a_mistake_of_the_caller(id):
    with pytest.raises(ValueError, match=f"token id {id} is outside the tokenizer's 0 to 259"):
        ByteTokenizer().decode([id])
    with pytest.raises(ValueError, match="outside the tokenizer's"):
        BYTE_FALLBACK.decode([BYTE_FALLBACK.vocab_size])
    with pytest.raises(ValueError, match="outside the tokenizer's"):
        BYTE_FALLBACK.stream().feed(-1)


@given(st.text())
def test_byte_lengths_of_a_text_add_up_to_its_bytes(text):
    for tokenizer in (ByteTokenizer(), BYTE_LEVEL):
        lengths = tokenizer.byte_lengths()
        assert sum(lengths[id] for id in tokenizer.encode(text)) == len(text.encode())


@pytest.mark.parametrize("text", ["the model", " the", "the the 東 🙂é x"])
def test_byte_lengths_of_byte_fallback_count_the_space_that_it_puts_in_front(text):
    """Llama's tokenizer encodes " " + text; its first token carries that space, which decoding drops again."""
    lengths = BYTE_FALLBACK.byte_lengths()
    assert sum(lengths[id] for id in BYTE_FALLBACK.encode(text)) == len((" " + text).encode())


@every_tokenizer
def test_special_tokens_have_no_bytes(tokenizer):
    lengths = tokenizer.byte_lengths()
    assert len(lengths) == tokenizer.vocab_size
    assert {lengths[id] for id in tokenizer.special_names} == {0}


def test_a_token_is_shown_to_people_on_one_line():
    tokenizer = ByteTokenizer()
    assert [tokenizer.token_text(id) for id in (0x41, 0x0A, 0x1B, 0xC3, 258)] == [
        "A",
        r"\n",
        r"\x1b",
        r"\xc3",
        "<|eos|>",
    ]
    assert BYTE_LEVEL.token_text(BYTE_LEVEL.encode(" the")[-1]) in (" the", "the")
    assert BYTE_FALLBACK.token_text(BYTE_FALLBACK.encode("the")[0]) == " the"
    assert BYTE_FALLBACK.token_text(3 + 0xE2) == r"\xe2"


# --- in a checkpoint --------------------------------------------------------------------------------------------------


@every_tokenizer
def test_a_tokenizer_comes_back_from_plain_types(tokenizer):
    plain = tokenizer.to_plain()
    back = tokenizer_from_plain(json.loads(json.dumps(plain)))
    assert back.to_plain() == plain
    assert (back.fingerprint, back.vocab_size, back.eos_id, back.pad_id) == (
        tokenizer.fingerprint,
        tokenizer.vocab_size,
        tokenizer.eos_id,
        tokenizer.pad_id,
    )
    assert back.special_names == tokenizer.special_names
    text = "the </s>model [EOS] <|endoftext|>"
    assert back.encode(text) == tokenizer.encode(text)


def test_fingerprints_tell_tokenizers_apart():
    other = [
        CharTokenizer("abc", unknown="error"),
        CharTokenizer("abc", unknown="unk"),
        CharTokenizer("abd", unknown="error"),
    ]
    fingerprints = [tokenizer.fingerprint for tokenizer in [*ALL.values(), *other]]
    assert len(set(fingerprints)) == len(fingerprints)
    assert all(len(fingerprint) == 12 and int(fingerprint, 16) >= 0 for fingerprint in fingerprints)


def test_a_kind_from_the_future_is_an_error():
    with pytest.raises(
        UserError, match="tokenizer: kind must be one of byte, char, hf in this version, got trie"
    ):
        tokenizer_from_plain({"kind": "trie"})


# --- files ------------------------------------------------------------------------------------------------------------


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """tokenizer.json with <|endoftext|> and <|pad|>, and nothing beside it."""
    path = tmp_path / "mine"
    path.mkdir()
    byte_level_backend().save(str(path / "tokenizer.json"))
    return path


@pytest.fixture
def gpt2_folder(tmp_path: Path) -> Path:
    """vocab.json and merges.txt alone: every byte, `th` and `the`, and <|endoftext|> at the end."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "<|endoftext|>"]
    write_json(tmp_path / "vocab.json", {token: id for id, token in enumerate(tokens)})
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e\n", encoding="utf-8")
    return tmp_path


def test_a_folder_with_tokenizer_json_needs_no_more(folder):
    tokenizer = load(folder)
    assert (tokenizer.kind, tokenizer.eos_id, tokenizer.pad_id) == ("hf", 0, 0)
    assert tokenizer.encode(TEXT) == BYTE_LEVEL.encode(TEXT)


def test_settings_beside_it_name_the_end_the_padding_and_the_template(folder):
    write_json(
        folder / "special_tokens_map.json",
        {"eos_token": "<|endoftext|>", "pad_token": {"content": "<|pad|>"}},
    )
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "bos_token": None,
            "eos_token": "the",
            "chat_template": "{{ messages }}",
        },
    )
    tokenizer = load(folder)
    assert (
        tokenizer.special_names[tokenizer.eos_id],
        tokenizer.special_names[tokenizer.pad_id],
    ) == ("the", "<|pad|>")
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.eos_id not in tokenizer.encode("the the")
    assert tokenizer_from_plain(tokenizer.to_plain()).chat_template == "{{ messages }}"


def test_a_template_in_a_file_of_its_own_is_kept(folder):
    (folder / "chat_template.jinja").write_text("{{ eos_token }}", encoding="utf-8")
    assert load(folder).chat_template == "{{ eos_token }}"


TOOLS = {"name": "tool_use", "template": "{{ tool_use }}"}
DEFAULT = {"name": "default", "template": "{{ default }}"}


@pytest.mark.parametrize(
    ("templates", "template", "line"),
    [
        ([TOOLS, DEFAULT], "{{ default }}", ""),
        ([DEFAULT], "{{ default }}", ""),
        ([], None, ""),
        (
            [TOOLS, DEFAULT | {"name": "rag"}],
            "{{ tool_use }}",
            "tokenizer_config.json: of the chat templates tool_use, rag, tool_use is used",
        ),
    ],
)
def test_of_named_templates_the_default_is_used(templates, template, line, folder, caplog):
    """As in transformers; without a default, the first, and a line says so."""
    write_json(folder / "tokenizer_config.json", {"chat_template": templates})
    with caplog.at_level(logging.INFO):
        assert load(folder).chat_template == template
    assert "".join(caplog.messages).endswith(line)
    assert len(caplog.messages) == bool(line)
    if DEFAULT in templates:
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        theirs.chat_template = {entry["name"]: entry["template"] for entry in templates}
        assert theirs.get_chat_template() == template


@pytest.mark.parametrize("value", [3, {"default": "x"}, [{"name": "default"}], ["x"]])
def test_a_template_of_another_kind_is_an_error(value, folder):
    write_json(folder / "tokenizer_config.json", {"chat_template": value})
    with pytest.raises(UserError) as caught:
        load(folder)
    assert str(caught.value) == (
        f"{folder / 'tokenizer_config.json'}: chat_template: must be the text of a template, or a "
        f"list of name and template, got {json.dumps(value)}. Write the text of one template."
    )


def test_gpt2s_two_files_are_a_tokenizer(gpt2_folder):
    """`the` is t+h, th+e: id 257 after 256 bytes and `th`; Ġ is the byte 0x20."""
    tokenizer = load(gpt2_folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert tokenizer.encode("the the") == [257, alphabet.index("Ġ"), 257]
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (258, 258, 259)
    assert tokenizer.decode(tokenizer.encode("é<|endoftext|>🙂")) == "é<|endoftext|>🙂"
    assert 258 not in tokenizer.encode("<|endoftext|>")


def bpe_json(vocab: object, merges: object = ()) -> str:
    return json.dumps({"model": {"type": "BPE", "vocab": vocab, "merges": list(merges)}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"version": "1.0", "trunc', "not valid JSON: Unterminated string"),
        ("", "not valid JSON: Expecting value"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "must be a JSON object, got list"),
        ("{}", "not a tokenizer: "),
        (bpe_json(["a"]), "not a tokenizer: "),
        (bpe_json({"a": "0"}), "not a tokenizer: "),
        (bpe_json({"a": -1}), "not a tokenizer: "),
        (bpe_json({"a": 0}, ["a b"]), "not a tokenizer: "),
        (bpe_json({}), "has no tokens"),
        (bpe_json({"a": 0, "b": 7}), "its 2 tokens must have the ids 0 to 1, but 1 is missing (the highest is 7)"),
        (bpe_json({"a": 0, "b": 0}), "its 2 tokens must have the ids 0 to 1, but 1 is missing (the highest is 0)"),
        (bpe_json({"a": 0, "b": 1}), 'no end-of-text token. Name one of its tokens in'),
    ],
)  # fmt: skip
def test_a_damaged_tokenizer_json_is_named(folder, text, message):
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load(folder)
    assert str(caught.value).startswith(f"{folder / 'tokenizer.json'}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("id", [900, 0])
def test_an_added_token_whose_id_is_not_its_place_is_named(folder, id):
    """E14, a gap: the library would number it with the next id after the vocabulary, and the
    model's row 900 would never be used.
    """
    description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    description["added_tokens"].append(
        {**description["added_tokens"][0], "content": "<more>", "id": id}
    )
    write_json(folder / "tokenizer.json", description)
    size = len(description["model"]["vocab"])
    with pytest.raises(UserError) as caught:
        load(folder)
    expected = (
        f"added token <more>: must have the id {size} of {size + 1} tokens, got {id}. Export the "
        f"tokenizer again."
    )
    assert str(caught.value) == f"{folder / 'tokenizer.json'}: {expected}"


def test_every_cut_off_tokenizer_json_is_named(folder):
    whole = (folder / "tokenizer.json").read_bytes()
    for size in range(0, len(whole) - 1, len(whole) // 40):
        (folder / "tokenizer.json").write_bytes(whole[:size])
        with pytest.raises(UserError, match="tokenizer.json: not"):
            load(folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer_config.json", "{", "tokenizer_config.json: not valid JSON"),
        (
            "tokenizer_config.json",
            '{"eos_token": 3}',
            "tokenizer_config.json: eos_token: must be the text of a token, got 3. Write the text of one token.",
        ),
        (
            "tokenizer_config.json",
            '{"eos_token": "<end>"}',
            "tokenizer_config.json: eos_token: the tokenizer in ",
        ),
        (
            "special_tokens_map.json",
            '{"pad_token": "<fill>"}',
            "special_tokens_map.json: pad_token: the tokenizer in ",
        ),
        (
            "special_tokens_map.json",
            '{"additional_special_tokens": "x"}',
            'additional_special_tokens: must be a list of tokens, got "x"',
        ),
    ],
)
def test_damaged_settings_are_named(folder, name, text, message):
    (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", b'{"a": 0', "vocab.json: not valid JSON"),
        ("vocab.json", b"\xff", "vocab.json: not UTF-8 text (byte 0)"),
        ("vocab.json", b'{"a": "0"}', 'vocab.json: a: must be an id of at least 0, got "0"'),
        ("vocab.json", b'{"a": true}', "vocab.json: a: must be an id of at least 0, got true"),
        ("vocab.json", b'{"a": -1}', "vocab.json: a: must be an id of at least 0, got -1"),
        (
            "vocab.json",
            b'{"a": 99999999999999999999}',
            "vocab.json: its 1 tokens must have the ids 0 to 0",
        ),
        (
            "merges.txt",
            b"t h\nth\n",
            'merges.txt:2: must be two tokens with a space between, got "th"',
        ),
        ("merges.txt", b"t h\nth q\n", "merges.txt: not a tokenizer: "),
    ],
)
def test_damaged_gpt2_files_are_named(gpt2_folder, name, content, message):
    (gpt2_folder / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(gpt2_folder)
    assert message in str(caught.value)


def test_a_vocabulary_without_an_end_says_where_to_name_one(gpt2_folder):
    vocabulary = json.loads((gpt2_folder / "vocab.json").read_text(encoding="utf-8"))
    del vocabulary["<|endoftext|>"]
    write_json(gpt2_folder / "vocab.json", vocabulary)
    with pytest.raises(UserError) as caught:
        load(gpt2_folder)
    assert str(caught.value) == (
        f"{gpt2_folder / 'vocab.json'}: no end-of-text token. Name one of its tokens in "
        f'{gpt2_folder / "tokenizer_config.json"}: {{"eos_token": "..."}}.'
    )


NOT_HERE = f"not found in {os.getcwd()}"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing/here/at/all", NOT_HERE),
        ("../gpt2", NOT_HERE),
        ("a b", NOT_HERE),
        ("x" * 300 + "/y/z", NOT_HERE),
        (__file__, "not a folder"),
    ],
)
def test_a_path_without_a_tokenizer_is_not_asked_of_the_hub(path, message, monkeypatch):
    monkeypatch.setattr("socket.create_connection", None)
    with pytest.raises(UserError) as caught:
        load(path)
    assert (
        f"{message}. Give a folder with tokenizer.json, or a Hugging Face name such as gpt2."
        in str(caught.value)
    )


@pytest.mark.parametrize("file", ["README.md", "tokenizer_config.json"])
def test_a_folder_without_a_vocabulary_says_what_is_missing(tmp_path, file):
    (tmp_path / file).write_text('{"tokenizer_class": "LlamaTokenizer"}', encoding="utf-8")
    with pytest.raises(
        UserError,
        match="has no tokenizer.json, and no vocab.json with merges.txt. Give the folder of a tokenizer",
    ):
        load(tmp_path)


def test_without_a_network_a_name_fails_at_once_and_names_the_alternatives(monkeypatch):
    def unreachable(address, timeout):
        assert timeout <= 10
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr("socket.create_connection", unreachable)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits to try again"))
    with pytest.raises(UserError) as caught:
        load("some-owner/some-model")
    assert (
        "some-owner/some-model: not found on this machine, and huggingface.co cannot be reached "
        "(Network is unreachable)." in str(caught.value)
    )
    assert "Give a local folder with tokenizer.json, or vocab.json and merges.txt." in str(
        caught.value
    )
    assert "HF_HUB_OFFLINE=1" in str(caught.value)


def test_offline_a_name_that_was_never_downloaded_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="not a folder, and cannot be downloaded: "):
        load("some-owner/some-model")


def test_a_download_that_breaks_off_is_one_line(monkeypatch):
    """The HTTP library's errors are no OSErrors."""

    def fail(name, allow_patterns):
        raise httpx.ReadError("connection lost")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr("tinylm.common.hub.require_hub", lambda where, fix: None)
    with pytest.raises(
        UserError,
        match="tokenizer.path: owner/name: not a folder, and cannot be downloaded: connection lost. "
        "Give a local folder",
    ):
        load("owner/name")


def test_a_name_that_is_too_long_is_no_folder():
    """The operating system refuses to look for it, and Path.is_dir passes that on."""
    assert is_hub_name("x" * 300 + "/name")


def test_a_name_on_the_hub_is_read_from_the_downloaded_folder(folder, monkeypatch):
    monkeypatch.setattr("tinylm.common.hub.require_hub", lambda where, fix: None)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, allow_patterns: str(folder)
    )
    assert load("some-owner/some-model").encode(TEXT) == BYTE_LEVEL.encode(TEXT)


@pytest.mark.slow
def test_an_older_format_is_converted_by_transformers(tmp_path):
    """BERT's vocab.txt: one token a line, its line number the id."""
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "model", "##s"]),
        encoding="utf-8",
    )
    write_json(
        tmp_path / "tokenizer_config.json",
        {"tokenizer_class": "BertTokenizer", "eos_token": "[SEP]", "pad_token": "[PAD]"},
    )
    tokenizer = load(tmp_path)
    assert tokenizer.encode("the models [SEP]")[:3] == [5, 6, 7]
    assert tokenizer.eos_id == 3 and 3 not in tokenizer.encode("the models [SEP]")
    assert [tokenizer.token_bytes(id) for id in (5, 6, 7)] == [b" the", b" model", b"s"]


@pytest.mark.slow
def test_what_transformers_cannot_convert_is_an_error(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"not SentencePiece")
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    with pytest.raises(
        UserError, match="has no tokenizer.json, and transformers cannot make one: "
    ):
        load(tmp_path)


@pytest.mark.skipif(
    "GPT2_BPE" not in os.environ,
    reason="GPT2_BPE names a folder with GPT-2's vocab.json and merges.txt",
)
def test_gpt2s_own_files_give_gpt2s_ids():
    """Known answers: "Hello world" is 15496 995; the letters of <|endoftext|> are seven tokens and never 50256."""
    tokenizer = load(Path(os.environ["GPT2_BPE"]))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (50257, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    lengths = tokenizer.byte_lengths()
    assert sum(lengths[id] for id in tokenizer.encode(TEXT)) == len(TEXT.encode())


@pytest.mark.slow
def test_importing_brings_neither_torch_nor_a_tokenizer_library():
    code = (
        "import sys, tinylm.tokenizer.hf, tinylm.text.sources; print([m for m in ('torch', "
        "'tokenizers', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout == "[]\n"
