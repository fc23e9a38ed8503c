"""A checkpoint as one GGUF file, for llama.cpp and programs that use it.

    Decoder ─ conversion.to_hf ─▶ Hugging Face model ─ Layout ─▶ tensors of GGUF ─┐
    config ─ add_settings, tokenizer ─ vocabulary_of, add_vocabulary ─────────────┴─▶ file ─ check_file
    file ─ read_gguf ─▶ Decoder

Names come from the `gguf` package's own table, so that this file has only what GGUF does
differently: its settings, queries and keys of Llama stored for rotating neighbors instead of
halves, and experts whose gates have a tensor of their own. Number types are in `gguf_types`, the
tokenizer is in `gguf_tokenizer`. The file is read back before it gets its name.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinylm.checkpoint.check import empty_model
from tinylm.checkpoint.load import Loaded, load_model
from tinylm.common.errors import UserError, require_package
from tinylm.common.files import require_new, writing
from tinylm.config.schema import ModelConfig
from tinylm.interchange import architectures, conversion
from tinylm.interchange.gguf_rope import add_rope_scaling, require_expressible
from tinylm.interchange.gguf_tokenizer import (
    USE_HF,
    Vocabulary,
    add_vocabulary,
    vocabulary_of,
    word_pattern_of,
)
from tinylm.interchange.gguf_types import (
    NUMBER_TYPES,
    NumberType,
    exact_tensor,
    quantize_file,
    require_llama_cpp,
    require_whole_blocks,
    rounded,
    rounded_array,
    stored_type,
)
from tinylm.interchange.hf_export import (
    OUT,
    Exported,
    check_model,
    publish,
    refuse_encoder_decoder,
    scratch_folder,
)
from tinylm.interchange.hf_tokenizer import backend_of, check_tokenizer, write_text
from tinylm.interchange.ollama import modelfile
from tinylm.model.decoder import Decoder
from tinylm.model.hf_model import HFModel, quiet_transformers

if TYPE_CHECKING:
    from gguf import GGUFWriter

logger = logging.getLogger(__name__)

# Hugging Face's architectures that GGUF has under another name. Without a window, which GGUF does
# not have for them, they differ from a Llama in nothing, or in their experts.
ARCHITECTURES = {"mistral": "llama", "mixtral": "llama"}
# Hugging Face's architectures whose files llama.cpp was seen to read as they are meant.
IN_GGUF = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gpt2")
CONVERT = f"{USE_HF}; llama.cpp's convert_hf_to_gguf.py reads the folder"


def export_gguf(ckpt: Path, out: Path, *, dtype: str = "f32") -> Exported:
    """Write the checkpoint `ckpt` as the new GGUF file `out`, whole or not at all,
    its matrices in the number type `dtype`, a name in NUMBER_TYPES; beside it a Modelfile.

    Raises:
        UserError: GGUF or its readers do not support the model or the type, `out` exists,
            or the logits differ.
    """
    require_package("transformers")
    require_package("gguf")
    type = NUMBER_TYPES[dtype]
    require_llama_cpp(type)
    if out.suffix != ".gguf":  # transformers recognizes the format by it
        raise UserError(out, "the name of a GGUF file must end in .gguf")
    recipe = out.with_suffix(".Modelfile")
    require_new(out)
    require_new(recipe)
    loaded, vocabulary = load_for_gguf(ckpt)
    config = loaded.model.config
    layout = Layout(config)
    needs = settings_for_transformers(config, layout.architecture)
    with quiet_transformers(), scratch_folder(out) as folder:
        file = folder / out.name
        first = NUMBER_TYPES["f32"] if type.by_llama_cpp else type
        weights = conversion.to_hf(loaded.model).state_dict()
        weights = dict(layout.stored(weights, n_tokens=len(vocabulary.tokens)))
        require_whole_blocks(ckpt, type, weights)
        with writing(out, OUT):
            write_file(file, layout, weights, loaded, vocabulary, first)
        del weights
        round_alike(loaded.model, first)
        difference = check_file(file, loaded, layout, needs)
        if type.by_llama_cpp:
            exact = file.rename(folder / "f32.gguf")
            quantize_file(exact, file, type)
            exact.unlink()
            ours = replace(loaded, model=read_gguf(file, config))
            difference = check_file(file, ours, layout, needs)
        with writing(recipe, OUT):
            text = modelfile(loaded, out.name, context=config.max_seq_len)
            write_text(folder / recipe.name, text)
        publish(file, out)
        publish(folder / recipe.name, recipe)
    return Exported(out, layout.architecture, difference, gguf_config=config, needs=needs)


def load_for_gguf(ckpt: Path) -> tuple[Loaded, Vocabulary]:
    """The model of a checkpoint as its file has it, and its tokenizer.

    Raises:
        UserError: GGUF does not have the tokenizer, the model or one of its settings.
    """
    loaded = load_model(ckpt)
    refuse_encoder_decoder(ckpt, loaded)
    try:
        vocabulary = vocabulary_of(loaded.tokenizer)
        model = model_for_gguf(loaded)
        check_expressible(model.config, conversion.hf_config(model.config).model_type)
    except UserError as error:
        raise error.within(ckpt) from None
    return replace(loaded, model=model), vocabulary


def model_for_gguf(loaded: Loaded) -> Decoder:
    """The decoder whose file is written: it computes what the model does, within its window.

    GGUF's Llama has no sliding window. In a context that is no longer than the window the two
    are equal, so the file has that context.

    Raises:
        UserError: it is a Hugging Face model that our decoder cannot compute.
    """
    model = loaded.model
    if isinstance(model, HFModel):
        try:
            model = conversion.from_hf(model.inner)
        except UserError as error:
            _, *setting = error.where  # the first is config.json, which the user has not written
            found = ": ".join((*setting, error.problem))
            problem = (
                f"a {model.inner.config.model_type} model is not supported in GGUF here ({found})"
            )
            raise UserError("its model", problem, CONVERT) from None
    window, longest = model.config.sliding_window, model.config.max_seq_len
    if window is None or model.config.rope_local_theta is not None:
        return model
    context = min(window, longest)
    if context < longest:
        logger.info(
            "note: GGUF has no sliding window, so the file's context is the window, %d of %d tokens",
            *(context, longest),
        )
    sizes = {"sliding_window": None, "full_attention_interval": None, "max_seq_len": context}
    return with_config(model, model.config.model_copy(update=sizes))


def with_config(model: Decoder, config: ModelConfig) -> Decoder:
    """A decoder with the weights of `model`, which fit, and another config, in eval mode."""
    made = empty_model(config)
    made.load_state_dict(model.state_dict(), assign=True)
    if config.tie_embeddings:
        made.head.weight = made.embedding.weight
    return made.eval()


def check_expressible(config: ModelConfig, model_type: str) -> None:
    """Raise a UserError for a setting that GGUF does not have,
    or that transformers does not read from it.
    """
    if model_type not in IN_GGUF:
        problem = f"a {model_type} model is not supported in GGUF here"
        raise UserError("model", problem, CONVERT)
    require_expressible(config, ARCHITECTURES.get(model_type, model_type))
    supported: dict[str, Any] = {}
    if model_type == "gpt2":
        supported["ffn"] = "gelu"
    else:
        supported["bias"] = "qkv" if model_type == "qwen2" else "none"
    if model_type == "mistral":
        # It is written as a Llama, whose width must be a multiple of n_heads in transformers.
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


@dataclass(frozen=True)
class Place:
    """Where a weight of a Hugging Face model is in a GGUF file, and how it lies there."""

    name: str
    n_heads: int | None = None
    """if given, the rows of each of these heads are reordered for rotating neighbors"""
    transposed: bool = False
    """whether its matrices are"""

    def stored(self, weight: Tensor) -> Tensor:
        """A Hugging Face weight as it is in the file."""
        if self.n_heads is not None:
            return interleave_halves(weight, self.n_heads)
        return weight.T if self.transposed and weight.dim() == 2 else weight

    def loaded(self, weight: Tensor) -> Tensor:
        """The inverse of `stored`."""
        if self.n_heads is not None:
            return halve_interleaved(weight, self.n_heads)
        return weight.T if self.transposed and weight.dim() == 2 else weight


class Layout:
    """The weights of a Hugging Face model by GGUF's names."""

    def __init__(self, config: ModelConfig):
        import gguf

        self.config = config
        model_type = conversion.hf_config(config).model_type
        self.architecture = ARCHITECTURES.get(model_type, model_type)
        numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        self._names = gguf.get_tensor_name_map(numbers[self.architecture], config.n_layers)

    @property
    def output(self) -> str:
        """The name of the output matrix."""
        return "token_embd.weight" if self.config.tie_embeddings else "output.weight"

    def places(self, name: str) -> tuple[Place, ...]:
        """The place of a Hugging Face weight; of the gates and values of experts, two."""
        gates, is_merged, _ = name.partition("gate_up_proj")
        if is_merged:
            return tuple(Place(self._new_name(f"{gates}{part}_proj")) for part in ("gate", "up"))
        new = self._new_name(name)
        if self.architecture == "llama" and ".attn_q." in new:
            return (Place(new, self.config.n_heads),)
        if self.architecture == "llama" and ".attn_k." in new:
            return (Place(new, self.config.n_kv_heads),)
        # transformers' GPT-2 has matrices (in, out)
        return (Place(new, transposed=self.architecture == "gpt2" and new.startswith("blk.")),)

    def _new_name(self, name: str) -> str:
        new = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new is not None, name
        return new if new.endswith((".weight", ".bias")) else f"{new}.weight"

    def stored(self, weights: dict[str, Tensor], *, n_tokens: int) -> Iterator[tuple[str, Tensor]]:
        """The weights of a Hugging Face model as they are in the file."""
        for name, weight in weights.items():
            if name == "lm_head.weight" and self.config.tie_embeddings:
                continue
            places = self.places(name)
            parts = weight.chunk(len(places), dim=1) if len(places) > 1 else (weight,)
            for place, part in zip(places, parts, strict=True):
                stored = place.stored(part)
                if place.name in ("token_embd.weight", "output.weight"):
                    # readers count tokens by rows, and further rows have no token
                    stored = stored[:n_tokens]
                yield place.name, stored

    def loaded(self, name: str, stored: dict[str, Tensor]) -> Tensor:
        """The Hugging Face weight `name` from those in a file."""
        parts = [place.loaded(stored[place.name]) for place in self.places(name)]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def interleave_halves(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder rows (n_heads * K, ...): i and i + K/2 of each head, which RoPE rotates together,
    become neighbors.

    >>> interleave_halves(torch.arange(8), 2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return weight.view(n_heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def halve_interleaved(weight: Tensor, n_heads: int) -> Tensor:
    """The inverse of `interleave_halves`.

    >>> halve_interleaved(torch.tensor([0, 2, 1, 3, 4, 6, 5, 7]), 2).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    return weight.view(n_heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def read_gguf(path: Path, config: ModelConfig) -> Decoder:
    """The decoder in a file that `export_gguf` wrote, its numbers in fp32;
    `config` is `Exported.gguf_config`.
    """
    from gguf import GGUFReader

    layout, tensors = Layout(config), {}
    for tensor in GGUFReader(path).tensors:
        tensors[tensor.name] = exact_tensor(tensor.data, tensor.tensor_type)
    in_file = config.model_copy(update={"vocab_size": len(tensors["token_embd.weight"])})
    return conversion.from_weights(
        conversion.hf_config(in_file), lambda name: layout.loaded(name, tensors)
    )


# --- the file ---


def write_file(
    path: Path,
    layout: Layout,
    weights: dict[str, Tensor],
    loaded: Loaded,
    vocabulary: Vocabulary,
    type: NumberType,
) -> None:
    """Write settings, tokenizer and weights into one file."""
    from gguf import GGUFWriter, LlamaFileType

    writer = GGUFWriter(path, layout.architecture)
    writer.add_name(f"tinylm {loaded.config.training.run_name}")
    writer.add_file_type(LlamaFileType[type.file_type])
    add_settings(writer, loaded.model.config, layout.architecture, n_tokens=len(vocabulary.tokens))
    add_vocabulary(writer, vocabulary, loaded)
    for name, weight in weights.items():
        stored = stored_type(type, name, weight, output=layout.output)
        array, kind = rounded_array(weight, stored)
        if not exact_tensor(array, kind).isfinite().all():
            problem, fix = "has non-finite numbers", "Export another checkpoint"
            if weight.isfinite().all():
                problem, fix = f"{problem} as {stored.lower()}", "Export with --dtype f32"
            raise UserError((loaded.info.path, name), problem, fix)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
    add_rope_scaling(writer, config)
    if config.moe is not None:
        writer.add_expert_count(config.moe.n_experts)
        writer.add_expert_used_count(config.moe.top_k)


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


def round_alike(model: Decoder, type: NumberType) -> None:
    """Round our weights as those in the file; rows are rounded one by one, so their order in it
    does not matter.
    """
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and not name.endswith(("positions.weight", "router.weight")):
            is_output = weight is model.head.weight
            output = "output" if is_output else ""
            weight.data = rounded(weight.data, stored_type(type, output, weight, output="output"))


def check_file(path: Path, ours: Loaded, layout: Layout, needs: dict[str, int]) -> float:
    """The largest difference of logits between the file and our decoder, rounded alike.

    transformers reads the file, except for a mixture of experts or a scaled context, which it does
    not know in GGUF: then `read_gguf` does, for transformers' model of the same settings.

    Raises:
        UserError: it is too large, or the tokenizer in the file gives other ids or another text.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True
    )
    check_tokenizer(tokenizer, ours.tokenizer)
    if word_pattern_of(json.loads(tokenizer.backend_tokenizer.to_str())) != word_pattern_of(
        json.loads(backend_of(ours.tokenizer).to_str())
    ):
        problem = "transformers splits words differently when it reads GGUF; nothing was exported"
        raise UserError("tokenizer", problem, USE_HF)
    if layout.config.moe is not None or layout.config.rope_scaling is not None:
        return check_model(conversion.to_hf(read_gguf(path, layout.config)), ours.model)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
        theirs = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True, **needs
        )
    return check_model(theirs, ours.model)
