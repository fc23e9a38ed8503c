"""A checkpoint as one GGUF file, for programs that read no folder: llama.cpp and what is built on it.

The weights come from the Hugging Face model that `hf.py` makes, renamed by the `gguf` package's own table, so that this file
knows only what GGUF does otherwise: which settings stand where, that Llama's queries and keys are stored for rotating
neighbours instead of halves, and how it writes a tokenizer. The file is read back through transformers before it is done.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tinylm.checkpoint.load import Loaded, load_model
from tinylm.common.errors import UserError, printable, require_package, writing
from tinylm.common.files import require_new
from tinylm.config.schema import ModelConfig
from tinylm.interchange import architectures
from tinylm.interchange.hf_export import (
    Exported,
    backend_of,
    chat_template,
    check_model,
    check_tokenizer,
    end_ids,
    publish,
    scratch_beside,
)
from tinylm.model.hf_model import HFModel, quiet_transformers
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.hf import HFTokenizer
from tinylm.tokenizer.pretokenize import PATTERNS

if TYPE_CHECKING:
    from gguf import GGUFWriter


Floats = Literal["f32", "f16"]
_CONTRACTIONS, _, _REST = PATTERNS["gpt4"].partition(r"\p{N}{1,3}")
# How text falls into words, and the name that GGUF has for it.
PRE_TOKENIZERS = {
    PATTERNS["gpt2"]: "gpt-2",
    PATTERNS[
        "gpt4"
    ]: "dbrx",  # "llama-bpe" has these words too, and takes a whole word as a token before any merge
    f"{_CONTRACTIONS}\\p{{N}}{_REST}": "qwen2",
}
TOKEN_TYPES = {"normal": 1, "control": 3, "user_defined": 4}


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE tokenizer as GGUF writes it."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]


def export_gguf(ckpt: Path, out: Path, *, floats: Floats = "f32") -> Exported:
    """Write the checkpoint `ckpt` as the new GGUF file `out`, whole or not at all; with f16 its matrices have half the bits.

    Raises:
        UserError: GGUF, or transformers' reader of it, cannot say the same; `out` already exists; or what was written does not give our logits.
    """
    require_package("transformers")
    require_package("gguf")
    if out.suffix != ".gguf":  # transformers tells the format by it
        raise UserError(f"{printable(out)}: a GGUF file's name ends in .gguf. Give such a name.")
    require_new(out)
    loaded = load_model(ckpt)
    if isinstance(loaded.model, HFModel):  # of those our decoder can be, the file is the same
        loaded = replace(loaded, model=architectures.from_hf(loaded.model.inner))
    config = loaded.model.config
    vocabulary = vocabulary_of(loaded.tokenizer)
    with quiet_transformers(), scratch_beside(out) as folder:
        theirs = architectures.to_hf(loaded.model)
        check_expressible(config, theirs.config.model_type)
        model_type = (
            "llama" if theirs.config.model_type == "mistral" else theirs.config.model_type
        )  # without a window they are one
        weights = dict(renamed(theirs.state_dict(), config, model_type))
        del theirs
        with writing(out, "where it goes"):
            write_file(folder / out.name, model_type, weights, loaded, vocabulary, floats)
        del weights
        needs = what_transformers_needs(config, model_type)
        difference = check_file(folder / out.name, loaded, floats, needs)
        publish(folder / out.name, out)
    return Exported(out, model_type, difference, needs=needs)


def check_expressible(config: ModelConfig, model_type: str) -> None:
    """UserError for a setting that GGUF has no place for, or that transformers does not read from it."""
    must: dict[str, Any] = {"moe": None, "sliding_window": None}
    must |= (
        {"ffn": "gelu"}
        if model_type == "gpt2"
        else {"bias": "qkv" if model_type == "qwen2" else "none"}
    )
    # A Mistral without a window is written as a Llama, of which transformers wants a width that its heads divide.
    must |= (
        {key: limit(config) for key, limit in architectures.LLAMA.limits.items()}
        if model_type == "mistral"
        else {}
    )
    for name, value in must.items():
        found = config.model_dump()[name]
        if found != value:
            told = f"{printable(json.dumps(found))} cannot be written as GGUF and checked; a {model_type} there has {json.dumps(value)}"
            raise UserError(f"model.{name}: {told}. Export with --format hf.")


# --- weights ----------------------------------------------------------------------------------------------------------


def renamed(
    weights: dict[str, Tensor], config: ModelConfig, model_type: str
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a Hugging Face model under GGUF's names and in its layout."""
    import gguf

    architecture = next(
        number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == model_type
    )
    names = gguf.get_tensor_name_map(architecture, config.n_layers)
    for name, weight in weights.items():
        if name == "lm_head.weight" and config.tie_embeddings:
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new is not None, name
        if model_type == "llama" and ".attn_q." in new:
            weight = neighbours(weight, config.n_heads)
        if model_type == "llama" and ".attn_k." in new:
            weight = neighbours(weight, config.n_kv_heads)
        if model_type == "gpt2" and new.startswith("blk.") and weight.dim() == 2:
            weight = weight.T  # transformers' GPT-2 has (in, out)
        yield new, weight


def neighbours(weight: Tensor, n_heads: int) -> Tensor:
    """Rows (n_heads * K, ...) so ordered that the pairs that are rotated together, i and i + K/2, are neighbours in each head.

    >>> neighbours(torch.arange(8), 2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return weight.view(n_heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def is_halved(name: str, weight: Tensor) -> bool:
    """Whether f16 concerns it: matrices, but not the table of positions, which is small and read once."""
    return weight.dim() > 1 and name != "position_embd.weight"


# --- the file ---------------------------------------------------------------------------------------------------------


def write_file(
    path: Path,
    model_type: str,
    weights: dict[str, Tensor],
    loaded: Loaded,
    vocabulary: Vocabulary,
    floats: Floats,
) -> None:
    """Settings, tokenizer and weights as one file."""
    from gguf import GGUFWriter, LlamaFileType

    writer = GGUFWriter(path, model_type)
    writer.add_name(f"tinylm {loaded.config.training.run_name}")
    writer.add_file_type(LlamaFileType.MOSTLY_F16 if floats == "f16" else LlamaFileType.ALL_F32)
    add_settings(writer, loaded.model.config, model_type, n_tokens=len(vocabulary.tokens))
    add_vocabulary(writer, vocabulary, loaded)
    for name, weight in weights.items():
        if name in (
            "token_embd.weight",
            "output.weight",
        ):  # further rows stand for nothing, and readers count the tokens
            weight = weight[: len(vocabulary.tokens)]
        halved = floats == "f16" and is_halved(name, weight)
        values = weight.half() if halved else weight.float()
        if not values.isfinite().all():
            mend = (
                "Export it as f32."
                if halved and weight.isfinite().all()
                else "Export another checkpoint."
            )
            raise UserError(
                f"{name}: has numbers that are not finite{' in 16 bits' if halved else ''}. {mend}"
            )
        writer.add_tensor(name, values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_settings(
    writer: GGUFWriter, config: ModelConfig, model_type: str, *, n_tokens: int
) -> None:
    """The shape of the decoder."""
    writer.add_vocab_size(n_tokens)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_heads)
    if model_type == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps)
        return
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, loaded: Loaded) -> None:
    """The tokenizer, and the tokens that open, end and fill a text."""
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    tokenizer, (end, *_) = loaded.tokenizer, end_ids(loaded)
    writer.add_bos_token_id(tokenizer.eos_id)  # EOS opens every document here
    writer.add_eos_token_id(end)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(False)
    template = chat_template(loaded)
    if template is not None:
        writer.add_chat_template(template)


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The tokenizer as GGUF writes it.

    Raises:
        UserError: it is not byte-level BPE, has no merge, or cuts words in a way that has no name there.
    """
    if not isinstance(tokenizer, HFTokenizer):
        raise UserError(
            f"tokenizer.kind: GGUF has no tokenizer of kind {tokenizer.kind}. Export with --format hf, or train with tokenizer.kind: bpe."
        )
    backend = backend_of(tokenizer)
    description = json.loads(backend.to_str())
    pre = PRE_TOKENIZERS.get(words_of(description))
    if pre is None:
        raise UserError(
            "tokenizer: GGUF is written for byte-level BPE with the words of GPT-2, GPT-4 or Qwen2, and this is another. Export with --format hf."
        )
    merges = [
        merge if isinstance(merge, str) else " ".join(merge)
        for merge in description["model"]["merges"]
    ]
    if not merges:
        raise UserError(
            "tokenizer: it has no merges, and GGUF needs one. Export with --format hf, or train with a larger tokenizer.vocab_size."
        )
    added = backend.get_added_tokens_decoder()
    kinds = {
        id: TOKEN_TYPES["control" if token.special else "user_defined"]
        for id, token in added.items()
    }
    tokens = [backend.id_to_token(id) for id in range(tokenizer.vocab_size)]
    return Vocabulary(
        pre, tokens, [kinds.get(id, TOKEN_TYPES["normal"]) for id in range(len(tokens))], merges
    )


def words_of(description: dict[str, Any]) -> str | None:
    """The pattern by which a byte-level BPE tokenizer cuts words; None where it is another kind of tokenizer."""
    normalizer, pieces = description["normalizer"], description["pre_tokenizer"]
    if (
        description["model"]["type"] != "BPE"
        or description["model"]["byte_fallback"]
        or pieces is None
    ):
        return None
    if normalizer not in (
        None,
        {"type": "NFC"},
    ):  # Qwen2's: text on disk is nearly always in that form already
        return None
    match pieces:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return PATTERNS["gpt2"]
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
    return None


# --- the check --------------------------------------------------------------------------------------------------------


def what_transformers_needs(config: ModelConfig, model_type: str) -> dict[str, int]:
    """Settings that stand in the file and that transformers does not read from it, where they are not its defaults."""
    theirs = {"qwen3": {"head_dim": (config.head_dim, 128)}}
    theirs["gpt2"] = {
        "n_positions": (config.max_seq_len, 1024),
        "n_inner": (config.d_ff, 4 * config.d_model),
    }
    return {
        name: value
        for name, (value, default) in theirs.get(model_type, {}).items()
        if value != default
    }


def check_file(path: Path, loaded: Loaded, floats: Floats, needs: dict[str, int]) -> float:
    """The largest difference of logits between the file as transformers reads it and our decoder, whose matrices are rounded as the file's are.

    Raises:
        UserError: it is too large, or the tokenizer in the file gives other ids or another text.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True
    )
    check_tokenizer(tokenizer, loaded.tokenizer)
    if words_of(json.loads(tokenizer.backend_tokenizer.to_str())) != words_of(
        json.loads(backend_of(loaded.tokenizer).to_str())
    ):
        raise UserError(
            "tokenizer: transformers cuts words in another way when it reads GGUF, so nothing was exported. Export with --format hf."
        )
    with contextlib.redirect_stderr(io.StringIO()):  # its bar asks nobody
        theirs = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True, **needs
        )
    if floats == "f16":
        for name, weight in loaded.model.named_parameters():
            if weight.dim() > 1 and name != "positions.weight":
                weight.data = weight.data.half().float()
    return check_model(theirs, loaded.model)
