from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from tinylm.common.errors import UserError, printable
from tinylm.config.schema import TokenizerConfig
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.byte_char import ByteTokenizer, CharTokenizer
from tinylm.tokenizer.hf import HFTokenizer, load_hf_tokenizer

if TYPE_CHECKING:
    pass


def make_tokenizer(config: TokenizerConfig, documents: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer that `config` asks for; `documents` gives the training split, which only `char` reads.

    Kind bpe, which keeps what it learned, is `bpe.tokenizer_for`.
    """
    if config.kind == "byte":
        return ByteTokenizer()
    if config.kind == "char":
        return CharTokenizer.of_documents(documents(), unknown=config.unknown)
    if config.path is None:
        raise ValueError(
            "kind hf needs a path, which TokenizerConfig checks; kind bpe is made by bpe.tokenizer_for"
        )
    return load_hf_tokenizer(config.path)


def tokenizer_from_plain(plain: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `to_plain` described.

    Raises:
        UserError: it is of a kind that this version does not know.
    """
    match plain["kind"]:
        case "byte":
            return ByteTokenizer()
        case "char":
            return CharTokenizer(plain["characters"], unknown=plain["unknown"])
        case "hf":
            from tokenizers import Tokenizer as Backend

            backend = Backend.from_str(plain["tokenizer_json"])
            return HFTokenizer(
                backend, eos=plain["eos"], pad=plain["pad"], chat_template=plain["chat_template"]
            )
    raise UserError(
        f"tokenizer kind {printable(plain['kind'])}: this version knows byte, char and hf. Use the version that wrote it."
    )


def named_tokenizer(name: str) -> Tokenizer:
    """`byte`, or the tokenizer in a folder or of a Hugging Face model."""
    return ByteTokenizer() if name == "byte" else load_hf_tokenizer(name)
