"""The tokenizer of a checkpoint in a GGUF file: byte-level BPE, by the name that llama.cpp has for
its pattern of words.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tinylm.checkpoint.load import Loaded
from tinylm.common.errors import UserError
from tinylm.interchange.hf_tokenizer import backend_of, chat_template, end_ids
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.hf import HFTokenizer
from tinylm.tokenizer.pretokenize import PATTERNS, byte_level_pattern

if TYPE_CHECKING:
    from gguf import GGUFWriter

# The pattern that splits text into words, whether a whole word that is a token is one before any
# merge, and the name of both in GGUF.
PRE_TOKENIZERS = {
    (PATTERNS["gpt2"], False): "gpt-2",
    (PATTERNS["gpt4"], False): "dbrx",
    (PATTERNS["gpt4"], True): "llama-bpe",
    (PATTERNS["qwen2"], False): "qwen2",
}
TOKEN_TYPES = {"normal": 1, "control": 3, "user_defined": 4}
USE_HF = "Export with --format hf"


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE tokenizer as it is in a GGUF file."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The tokenizer as it is in a GGUF file.

    Raises:
        UserError: it is not byte-level BPE, has no merges,
            or splits words by a pattern without a name there.
    """
    if not isinstance(tokenizer, HFTokenizer):
        problem = f"a tokenizer of kind {tokenizer.kind} is not supported in GGUF"
        raise UserError("tokenizer.kind", problem, f"{USE_HF}, or train with tokenizer.kind: bpe")
    backend = backend_of(tokenizer)
    description = json.loads(backend.to_str())
    whole_words = bool(description["model"].get("ignore_merges"))
    pre = PRE_TOKENIZERS.get((word_pattern_of(description) or "", whole_words))
    if pre is None:
        problem = "must be byte-level BPE with the words of GPT-2, GPT-4 or Qwen2 for GGUF"
        raise UserError("tokenizer", problem, USE_HF)
    merges = [
        merge if isinstance(merge, str) else " ".join(merge)
        for merge in description["model"]["merges"]
    ]
    if not merges:
        fix = f"{USE_HF}, or train with a larger tokenizer.vocab_size"
        raise UserError("tokenizer", "has no merges, but GGUF needs some", fix)
    added = backend.get_added_tokens_decoder()
    kinds = {
        id: TOKEN_TYPES["control" if token.special else "user_defined"]
        for id, token in added.items()
    }
    tokens = [backend.id_to_token(id) for id in range(tokenizer.vocab_size)]
    return Vocabulary(
        pre, tokens, [kinds.get(id, TOKEN_TYPES["normal"]) for id in range(len(tokens))], merges
    )


def word_pattern_of(description: dict[str, Any]) -> str | None:
    """The pattern by which a byte-level BPE tokenizer splits text into words;
    None for another kind of tokenizer.
    """
    normalizer, pieces = description["normalizer"], description["pre_tokenizer"]
    if (
        description["model"]["type"] != "BPE"
        or description["model"]["byte_fallback"]
        or pieces is None
    ):
        return None
    # NFC is Qwen2's: text on disk is nearly always in that form already
    if normalizer not in (None, {"type": "NFC"}):
        return None
    return byte_level_pattern(pieces)


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, loaded: Loaded) -> None:
    """Write the tokenizer, and the tokens that begin, end and pad a text."""
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    tokenizer, (end, *_) = loaded.tokenizer, end_ids(loaded.tokenizer, loaded.template)
    writer.add_bos_token_id(tokenizer.eos_id)  # EOS precedes every document here
    writer.add_eos_token_id(end)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(False)
    template = chat_template(loaded.tokenizer, loaded.template)
    if template is not None:
        writer.add_chat_template(template)
