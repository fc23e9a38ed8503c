"""Special tokens that are added to a tokenizer, such as the marks of a chat template."""

from collections.abc import Sequence

# hf is imported for a tokenizer of that kind
from tinylm import tokenizer as tokenizers
from tinylm.common.errors import UserError
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.byte_char import ByteTokenizer, CharTokenizer


def check_names(names: Sequence[str], where: str = "special token") -> None:
    """Raise a UserError for a special token that is given twice, or whose name is not one."""
    for name in names:
        visible = name.isprintable() and not any(character.isspace() for character in name)
        if len(name) < 2 or not visible:
            raise UserError(
                (where, name),
                "must be two or more visible characters",
                "Choose another, such as <|endoftext|>",
            )
        if list(names).count(name) > 1:
            raise UserError((where, name), "is given twice", "Give it once")


def add_special_tokens(tokenizer: Tokenizer, names: Sequence[str]) -> Tokenizer:
    """The tokenizer with these special tokens; those that it lacks get the next ids, in this order,
    so that no other id changes.

    >>> marked = add_special_tokens(ByteTokenizer(), ["<|im_start|>", "<|sep|>", "<|im_end|>"])
    >>> marked.special_names[260], marked.special_names[261], marked.vocab_size
    ('<|im_start|>', '<|im_end|>', 262)

    Raises:
        UserError: a name is not one for a special token.
    """
    check_names(names, "tokenizer.special_tokens")
    known = set(tokenizer.special_names.values())
    new = [name for name in names if name not in known]
    if not new:
        return tokenizer
    plain = tokenizer.to_plain()
    if isinstance(tokenizer, ByteTokenizer | CharTokenizer):
        plain["special_tokens"] = [*tokenizer.added, *new]
        return type(tokenizer).from_plain(plain)
    hf = tokenizers.hf
    backend = hf.read_backend(plain["tokenizer_json"])
    backend.add_special_tokens(new)
    return hf.HFTokenizer(
        backend, eos=plain["eos"], pad=plain["pad"], chat_template=plain["chat_template"]
    )
