"""Which class a kind of tokenizer has, and tokenizers from settings, checkpoints and names.

Kinds bpe and char are learned from a text: training/tokenizer.py. Learned BPE is a tokenizer of
kind hf.
"""

from typing import Any

# hf and hf_files are imported at their first use
from tinylm import tokenizer as tokenizers
from tinylm.common.errors import UserError, first_line
from tinylm.config.schema import TokenizerConfig
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.byte_char import ByteTokenizer, CharTokenizer


def make_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of kind byte or hf.

    Raises:
        UserError: as `load_hf_tokenizer` and `add_special_tokens`.
        ValueError: the kind is learned.
    """
    if config.kind == "byte":
        tokenizer: Tokenizer = ByteTokenizer()
    elif config.path is None:  # TokenizerConfig requires it for hf
        raise ValueError(f"kind {config.kind} is learned: see training/tokenizer.py")
    else:
        tokenizer = tokenizers.hf_files.load_hf_tokenizer(config.path)
    if config.special_tokens:
        tokenizer = tokenizers.added.add_special_tokens(tokenizer, config.special_tokens)
    return tokenizer


def tokenizer_from_plain(plain: dict[str, Any]) -> Tokenizer:
    """The inverse of `Tokenizer.to_plain`.

    Raises:
        UserError: this version does not know the kind, or `plain` is not what `to_plain` returned.
    """
    kind, fix = plain.get("kind"), "Use the version that wrote it"
    try:
        if kind == "byte":
            return ByteTokenizer.from_plain(plain)
        if kind == "char":
            return CharTokenizer.from_plain(plain)
        if kind == "hf":
            return tokenizers.hf.HFTokenizer.from_plain(plain)
    # what these classes and the library raise for values of another type
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        problem = f"kind {kind} cannot be read: {type(error).__name__}: {first_line(error)}"
        raise UserError("tokenizer", problem, fix) from None
    problem = f"kind must be one of byte, char, hf in this version, got {kind}"
    raise UserError("tokenizer", problem, fix)


def named_tokenizer(name: str) -> Tokenizer:
    """`byte`, or the tokenizer in a folder or of a Hugging Face model."""
    return ByteTokenizer() if name == "byte" else tokenizers.hf_files.load_hf_tokenizer(name)
