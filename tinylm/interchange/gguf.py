"""A checkpoint as one GGUF file, for llama.cpp and programs that use it.

    Decoder ─ conversion.to_hf ─▶ Hugging Face model ─ renamed ─▶ tensors of GGUF ─┐
    config ─ add_settings, tokenizer ─ vocabulary_of, add_vocabulary ──────────────┴─▶ file ─ check_file

Names come from the `gguf` package's own table, so that this file has only what GGUF does
differently: its settings, queries and keys of Llama stored for rotating neighbors instead of
halves, and its tokenizers. The file is read back through transformers before it gets its name.
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
from tinylm.common.errors import UserError, require_package, writing
from tinylm.common.files import require_new
from tinylm.config.schema import ModelConfig
from tinylm.interchange import architectures, conversion
from tinylm.interchange.hf_export import OUT, Exported, check_model, publish, scratch_folder
from tinylm.interchange.hf_tokenizer import backend_of, chat_template, check_tokenizer, end_ids
from tinylm.model.hf_model import HFModel, quiet_transformers
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.hf import HFTokenizer
from tinylm.tokenizer.pretokenize import PATTERNS, byte_level_pattern

if TYPE_CHECKING:
    from gguf import GGUFWriter


Floats = Literal["f32", "f16"]
_CONTRACTIONS, _, _REST = PATTERNS["gpt4"].partition(r"\p{N}{1,3}")
# The pattern that splits text into words, and its name in GGUF.
PRE_TOKENIZERS = {
    PATTERNS["gpt2"]: "gpt-2",
    # "llama-bpe" has the same words, but makes a whole word one token before any merge
    PATTERNS["gpt4"]: "dbrx",
    f"{_CONTRACTIONS}\\p{{N}}{_REST}": "qwen2",
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


def export_gguf(ckpt: Path, out: Path, *, floats: Floats = "f32") -> Exported:
    """Write the checkpoint `ckpt` as the new GGUF file `out`, whole or not at all;
    with f16 its matrices have 16 bits.

    Raises:
        UserError: GGUF or transformers' reader does not support the model, `out` exists,
            or the logits differ.
    """
    require_package("transformers")
    require_package("gguf")
    if out.suffix != ".gguf":  # transformers recognizes the format by it
        raise UserError(out, "the name of a GGUF file must end in .gguf")
    require_new(out)
    loaded = load_model(ckpt)
    if isinstance(loaded.model, HFModel):  # the file is that of the decoder which computes the same
        loaded = replace(loaded, model=conversion.from_hf(loaded.model.inner))
    config = loaded.model.config
    vocabulary = vocabulary_of(loaded.tokenizer)
    with quiet_transformers(), scratch_folder(out) as folder:
        theirs = conversion.to_hf(loaded.model)
        check_expressible(config, theirs.config.model_type)
        model_type = theirs.config.model_type
        if model_type == "mistral":  # without a window the two are the same
            model_type = "llama"
        weights = dict(renamed(theirs.state_dict(), config, model_type))
        del theirs
        with writing(out, OUT):
            write_file(folder / out.name, model_type, weights, loaded, vocabulary, floats)
        del weights
        needs = settings_for_transformers(config, model_type)
        difference = check_file(folder / out.name, loaded, floats, needs)
        publish(folder / out.name, out)
    return Exported(out, model_type, difference, needs=needs)


def check_expressible(config: ModelConfig, model_type: str) -> None:
    """Raise a UserError for a setting that GGUF does not have,
    or that transformers does not read from it.
    """
    supported: dict[str, Any] = {"moe": None, "sliding_window": None}
    if model_type == "gpt2":
        supported["ffn"] = "gelu"
    else:
        supported["bias"] = "qkv" if model_type == "qwen2" else "none"
    if model_type == "mistral":
        # Without a window it is written as a Llama, whose width must be a multiple of n_heads
        # in transformers.
        for name, limit in architectures.LLAMA.limits.items():
            supported[name] = limit(config)
    settings = config.model_dump()
    for name, value in supported.items():
        if settings[name] != value:
            found, expected = json.dumps(settings[name]), json.dumps(value)
            problem = (
                f"{found} is not supported in a GGUF file that can be checked; "
                f"a {model_type} has {expected} there"
            )
            raise UserError(f"model.{name}", problem, USE_HF)


# --- weights ---


def renamed(
    weights: dict[str, Tensor], config: ModelConfig, model_type: str
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a Hugging Face model by GGUF's names and in its layout."""
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
            weight = interleave_halves(weight, config.n_heads)
        if model_type == "llama" and ".attn_k." in new:
            weight = interleave_halves(weight, config.n_kv_heads)
        if model_type == "gpt2" and new.startswith("blk.") and weight.dim() == 2:
            weight = weight.T  # transformers' GPT-2 has (in, out)
        yield new, weight


def interleave_halves(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder rows (n_heads * K, ...): i and i + K/2 of each head, which RoPE rotates together,
    become neighbors.

    >>> interleave_halves(torch.arange(8), 2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return weight.view(n_heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def is_halved(name: str, weight: Tensor) -> bool:
    """Whether f16 applies to it: to matrices, except the position embedding, which is small."""
    return weight.dim() > 1 and name != "position_embd.weight"


# --- the file ---


def write_file(
    path: Path,
    model_type: str,
    weights: dict[str, Tensor],
    loaded: Loaded,
    vocabulary: Vocabulary,
    floats: Floats,
) -> None:
    """Write settings, tokenizer and weights into one file."""
    from gguf import GGUFWriter, LlamaFileType

    writer = GGUFWriter(path, model_type)
    writer.add_name(f"tinylm {loaded.config.training.run_name}")
    writer.add_file_type(LlamaFileType.MOSTLY_F16 if floats == "f16" else LlamaFileType.ALL_F32)
    add_settings(writer, loaded.model.config, model_type, n_tokens=len(vocabulary.tokens))
    add_vocabulary(writer, vocabulary, loaded)
    for name, weight in weights.items():
        if name in ("token_embd.weight", "output.weight"):
            # readers count tokens by rows, and further rows have no token
            weight = weight[: len(vocabulary.tokens)]
        writer.add_tensor(name, _stored_values(name, weight, floats).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _stored_values(name: str, weight: Tensor, floats: Floats) -> Tensor:
    """The weight in the precision of the file; a UserError if a number in it is not finite."""
    if floats == "f32" or not is_halved(name, weight):
        values, problem, fix = weight.float(), "has non-finite numbers", "Export another checkpoint"
    else:
        values, problem, fix = (
            weight.half(),
            "has non-finite numbers in 16 bits",
            "Export it as f32",
        )
        if not weight.isfinite().all():
            fix = "Export another checkpoint"
    if not values.isfinite().all():
        raise UserError(name, problem, fix)
    return values


def add_settings(
    writer: GGUFWriter, config: ModelConfig, model_type: str, *, n_tokens: int
) -> None:
    """Write the sizes of the decoder."""
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
    pre = PRE_TOKENIZERS.get(word_pattern_of(description))
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


# --- the check ---


def settings_for_transformers(config: ModelConfig, model_type: str) -> dict[str, int]:
    """Settings in the file that transformers does not read from it,
    if they differ from its defaults.
    """
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
    """The largest difference of logits between the file, read by transformers, and our decoder,
    rounded alike.

    Raises:
        UserError: it is too large, or the tokenizer in the file gives other ids or another text.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True
    )
    check_tokenizer(tokenizer, loaded.tokenizer)
    if word_pattern_of(json.loads(tokenizer.backend_tokenizer.to_str())) != word_pattern_of(
        json.loads(backend_of(loaded.tokenizer).to_str())
    ):
        problem = "transformers splits words differently when it reads GGUF; nothing was exported"
        raise UserError("tokenizer", problem, USE_HF)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
        theirs = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True, **needs
        )
    if floats == "f16":
        for name, weight in loaded.model.named_parameters():
            if weight.dim() > 1 and name != "positions.weight":
                weight.data = weight.data.half().float()
    return check_model(theirs, loaded.model)
