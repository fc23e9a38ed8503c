"""Special tokens that are added to a tokenizer of any kind."""

from typing import Any

import pytest

from tests.training.test_finetune import byte_level
from tinylm.common.errors import UserError
from tinylm.config.schema import TokenizerConfig
from tinylm.interchange.gguf_tokenizer import TOKEN_TYPES, vocabulary_of
from tinylm.interchange.hf_tokenizer import backend_of
from tinylm.tokenizer.added import add_special_tokens
from tinylm.tokenizer.byte_char import ByteTokenizer, CharTokenizer
from tinylm.tokenizer.factory import tokenizer_from_plain
from training.tokenizer import learn_from_texts

MARKS = ("<|im_start|>", "<|im_end|>")
TEXT = "a text <|im_start|> with all\n"
KINDS: dict[str, Any] = {
    "byte": ByteTokenizer(),
    "char": CharTokenizer(TEXT, unknown="unk"),
    "hf": byte_level(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_new_tokens_follow_the_known_ones_and_change_none(kind: str) -> None:
    """Ids of text and of other special tokens are as before; a text that spells a mark is text."""
    known = KINDS[kind]
    marked = add_special_tokens(known, MARKS)
    assert marked.vocab_size == known.vocab_size + 2
    assert known.special_names.items() <= marked.special_names.items()
    assert [marked.special_names[known.vocab_size + n] for n in range(2)] == list(MARKS)
    assert marked.encode(TEXT) == known.encode(TEXT)
    allowed = marked.encode(TEXT, allowed_special="all")
    assert allowed.count(known.vocab_size) == 1
    assert marked.decode(marked.encode(TEXT)) == TEXT
    assert marked.decode([known.vocab_size]) == ""
    assert (marked.eos_id, marked.pad_id) == (known.eos_id, known.pad_id)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_and_tokenizer_json_have_the_new_tokens(kind: str) -> None:
    """`tokenizers` reads the exported file and finds the same ids; without new tokens the stored
    form, and with it the fingerprint, is as before.
    """
    marked = add_special_tokens(KINDS[kind], MARKS)
    assert tokenizer_from_plain(marked.to_plain()).fingerprint == marked.fingerprint
    assert marked.fingerprint != KINDS[kind].fingerprint
    backend = backend_of(marked)
    assert [backend.token_to_id(name) for name in MARKS] == [
        marked.vocab_size - 2,
        marked.vocab_size - 1,
    ]
    ids = backend.encode("a<|im_end|>", add_special_tokens=False).ids
    assert ids == [*marked.encode("a"), marked.vocab_size - 1]
    assert add_special_tokens(marked, MARKS) is marked
    assert "special_tokens" not in KINDS[kind].to_plain()


def test_learned_bpe_counts_them_and_gguf_calls_them_control() -> None:
    """256 bytes, 2 special tokens, 2 marks and 10 merges are 270 tokens; no merge crosses a mark."""
    config = TokenizerConfig(kind="bpe", vocab_size=270, special_tokens=MARKS)
    tokenizer = learn_from_texts(config, ["low low lower <|im_start|>lowest<|im_end|>"] * 3)
    assert tokenizer.vocab_size <= 270
    ids = {name: id for id, name in tokenizer.special_names.items()}
    types = vocabulary_of(tokenizer).types
    assert all(types[ids[name]] == TOKEN_TYPES["control"] for name in MARKS)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("<|a b|>",), "tokenizer.special_tokens: <|a b|>: must be two or more visible characters"),
        (("<|a|>", "<|a|>"), "tokenizer.special_tokens: <|a|>: is given twice"),
        (("x",), "tokenizer.special_tokens: x: must be two or more visible characters"),
    ],
)
def test_a_name_that_is_none_is_refused(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        add_special_tokens(ByteTokenizer(), names)
    assert str(caught.value).startswith(message)
