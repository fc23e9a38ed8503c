"""Our decoder as a Hugging Face model and back: the settings, then the weights, by one table an architecture.

`hf_config` finds the architecture that computes the same function and writes its settings; `to_hf` and `from_hf` carry
the weights over, so that both models give the same logits. A setting that no architecture here has, or that our decoder
has not, is a `UserError` that names it. This file knows nothing of tokenizers, of files or of the hub.

Another architecture is another `Architecture` below: what it fixes, what its settings are called, where its weights go.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from torch import Generator, Tensor, cat, no_grad, randint

from tinylm.checkpoint.initial import empty_decoder
from tinylm.common.errors import UserError, printable
from tinylm.config.schema import ModelConfig, MoEConfig
from tinylm.model.decoder import Decoder
from tinylm.model.hf_model import HFModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Architecture:
    """One Hugging Face architecture; dotted names lead into a section, `{}` stands for the number of the layer."""

    model_type: str
    ours: dict[str, Any]
    """settings of ModelConfig that it fixes"""
    theirs: dict[str, Any]
    """settings of its config.json that our decoder fixes; `layer_types` is what every layer is"""
    settings: dict[str, str]
    """every other setting: our name, its name"""
    modules: dict[str, str | tuple[str, ...]]
    """where weights and biases go: our module, its module, or those that ours holds as one matrix, top to bottom"""
    transposed: tuple[str, ...] = ()
    """our modules whose matrix it stores as (in, out)"""
    limits: dict[str, Callable[[ModelConfig], Any]] = field(default_factory=dict)
    """settings of ModelConfig that follow from others in it"""


# --- the architectures ------------------------------------------------------------------------------------------------

_NO_EXTRAS = {"norm_placement": "pre", "qk_norm": False, "n_sinks": 0}

LLAMA = Architecture(
    "llama",
    ours=_NO_EXTRAS
    | {
        "position": "rope",
        "norm": "rmsnorm",
        "ffn": "swiglu",
        "bias": "none",
        "sliding_window": None,
        "moe": None,
    },
    theirs={
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_parameters.rope_type": "default",
    },
    settings={
        "vocab_size": "vocab_size",
        "max_seq_len": "max_position_embeddings",
        "n_layers": "num_hidden_layers",
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "d_ff": "intermediate_size",
        "rope_theta": "rope_parameters.rope_theta",
        "norm_eps": "rms_norm_eps",
        "attention_dropout": "attention_dropout",
        "tie_embeddings": "tie_word_embeddings",
    },
    modules={
        "embedding": "model.embed_tokens",
        "blocks.{}.attention_norm": "model.layers.{}.input_layernorm",
        "blocks.{}.attention.qkv": (
            "model.layers.{}.self_attn.q_proj",
            "model.layers.{}.self_attn.k_proj",
            "model.layers.{}.self_attn.v_proj",
        ),
        "blocks.{}.attention.out": "model.layers.{}.self_attn.o_proj",
        "blocks.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
        "blocks.{}.ffn.up": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
        "blocks.{}.ffn.down": "model.layers.{}.mlp.down_proj",
        "norm": "model.norm",
        "head": "lm_head",
    },
    # transformers refuses a Llama whose width is no multiple of its heads, although head_dim says all
    limits={"d_model": lambda config: math.ceil(config.d_model / config.n_heads) * config.n_heads},
)

LLAMA_WITH_BIASES = replace(
    LLAMA,
    ours=LLAMA.ours | {"bias": "all"},
    theirs=LLAMA.theirs | {"attention_bias": True, "mlp_bias": True},
)

MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    ours={key: value for key, value in LLAMA.ours.items() if key != "sliding_window"},
    theirs={"hidden_act": "silu", "rope_parameters.rope_type": "default"},
    settings=LLAMA.settings | {"sliding_window": "sliding_window"},
    limits={},
)

_FULL = {"layer_types": "full_attention", "use_sliding_window": False}
# Which layers have a window is said three times; transformers reads layer_types, and other programs max_window_layers.
_WINDOW = {"layer_types": "sliding_attention", "use_sliding_window": True, "max_window_layers": 0}

QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    ours=LLAMA.ours | {"bias": "qkv"},
    theirs={"hidden_act": "silu", "rope_parameters.rope_type": "default"} | _FULL,
    settings={key: value for key, value in LLAMA.settings.items() if key != "head_dim"},
    limits={"head_dim": lambda config: config.d_model / config.n_heads},
)

QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    ours=LLAMA.ours | {"qk_norm": True},
    theirs={"hidden_act": "silu", "attention_bias": False, "rope_parameters.rope_type": "default"}
    | _FULL,
    modules=LLAMA.modules
    | {
        "blocks.{}.attention.q_norm": "model.layers.{}.self_attn.q_norm",
        "blocks.{}.attention.k_norm": "model.layers.{}.self_attn.k_norm",
    },
    limits={},
)


def _windowed(architecture: Architecture) -> Architecture:
    """The same with a window in every layer."""
    ours = {key: value for key, value in architecture.ours.items() if key != "sliding_window"}
    return replace(
        architecture,
        ours=ours,
        theirs=architecture.theirs | _WINDOW,
        settings=architecture.settings | {"sliding_window": "sliding_window"},
    )


MIXTRAL = Architecture(
    "mixtral",
    ours=_NO_EXTRAS | {"position": "rope", "norm": "rmsnorm", "ffn": "swiglu", "bias": "none"},
    theirs={"hidden_act": "silu", "rope_parameters.rope_type": "default"},
    settings=LLAMA.settings
    | {
        "sliding_window": "sliding_window",
        "moe.n_experts": "num_local_experts",
        "moe.top_k": "num_experts_per_tok",
        "moe.balance_coef": "router_aux_loss_coef",
    },
    modules={name: theirs for name, theirs in LLAMA.modules.items() if ".ffn." not in name}
    | {
        "blocks.{}.ffn.router": "model.layers.{}.mlp.gate",
        "blocks.{}.ffn.up": "model.layers.{}.mlp.experts.gate_up_proj",
        "blocks.{}.ffn.down": "model.layers.{}.mlp.experts.down_proj",
    },
    limits={"moe": lambda config: (config.moe or MoEConfig()).model_dump()},
)

GPT2 = Architecture(
    "gpt2",
    ours=_NO_EXTRAS
    | {
        "position": "learned",
        "norm": "layernorm",
        "ffn": "gelu",
        "bias": "all",
        "sliding_window": None,
        "moe": None,
    },
    theirs={
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    settings={
        "vocab_size": "vocab_size",
        "max_seq_len": "n_positions",
        "n_layers": "n_layer",
        "d_model": "n_embd",
        "n_heads": "n_head",
        "d_ff": "n_inner",
        "norm_eps": "layer_norm_epsilon",
        "attention_dropout": "attn_pdrop",
        "residual_dropout": "resid_pdrop",
        "tie_embeddings": "tie_word_embeddings",
    },
    modules={
        "embedding": "transformer.wte",
        "positions": "transformer.wpe",
        "blocks.{}.attention_norm": "transformer.h.{}.ln_1",
        "blocks.{}.attention.qkv": "transformer.h.{}.attn.c_attn",
        "blocks.{}.attention.out": "transformer.h.{}.attn.c_proj",
        "blocks.{}.ffn_norm": "transformer.h.{}.ln_2",
        "blocks.{}.ffn.up": "transformer.h.{}.mlp.c_fc",
        "blocks.{}.ffn.down": "transformer.h.{}.mlp.c_proj",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    },
    transposed=("attention.qkv", "attention.out", "ffn.up", "ffn.down"),
    limits={
        "n_kv_heads": lambda config: config.n_heads,
        "head_dim": lambda config: config.d_model / config.n_heads,
    },
)


def _gpt2_with(ours: str, theirs: str) -> Architecture:
    return replace(
        GPT2, ours=GPT2.ours | {"ffn": ours}, theirs=GPT2.theirs | {"activation_function": theirs}
    )


# Where two say the same, the first is written and each is read.
ARCHITECTURES = (
    LLAMA,
    LLAMA_WITH_BIASES,
    MISTRAL,
    QWEN2,
    _windowed(QWEN2),
    QWEN3,
    _windowed(QWEN3),
    MIXTRAL,
    GPT2,
    _gpt2_with("silu", "silu"),
    _gpt2_with("relu2", "relu2"),
    _gpt2_with("gelu", "gelu_pytorch_tanh"),
)


# --- settings ---------------------------------------------------------------------------------------------------------


def hf_config(config: ModelConfig) -> PreTrainedConfig:
    """The Hugging Face config of the architecture that computes what this decoder computes.

    It has no special token ids: those are the tokenizer's. How the decoder was trained stays behind where the
    architecture has no such setting (`init`, `gradient_checkpointing`; in all but GPT-2 `residual_dropout`).

    Raises:
        UserError: no architecture here does; it names the setting and the nearest architecture.
    """
    from transformers import AutoConfig

    architecture = _architecture_of(config)
    found = _flat(config)
    settings = architecture.theirs | {
        theirs: found[ours] for ours, theirs in architecture.settings.items()
    }
    if architecture.model_type == "gpt2":
        settings["embd_pdrop"] = config.residual_dropout
    if "layer_types" in settings:
        settings["layer_types"] = [settings["layer_types"]] * config.n_layers
    made = AutoConfig.for_model(
        architecture.model_type, bos_token_id=None, eos_token_id=None, **_nested(settings)
    )
    if config.position == "rope":
        made.rope_theta = (
            config.rope_theta
        )  # for readers older than transformers 5, which know no rope_parameters
    return made


def our_config(config: PreTrainedConfig) -> ModelConfig:
    """The decoder that computes what a Hugging Face model with this config computes.

    Raises:
        UserError: our decoder cannot; it names the architecture or the setting.
    """
    architecture = _architecture_read(config)
    found = _settings_of(config)
    settings = architecture.ours | {
        ours: found[theirs] for ours, theirs in architecture.settings.items()
    }
    try:
        return ModelConfig.model_validate(_nested(settings))
    except ValidationError as invalid:
        error = invalid.errors()[0]
        key = ".".join(map(str, error["loc"]))
        where, value = (
            (architecture.settings[key], _shown(found[architecture.settings[key]]))
            if key in architecture.settings
            else ("its settings", "")
        )
        raise UserError(
            f"config.json: {where}: {value} {printable(error['msg'])}. Our decoder has no such model; choose another."
        ) from None


def _architecture_read(config: PreTrainedConfig) -> Architecture:
    """The architecture that a Hugging Face config describes."""
    known = [
        architecture
        for architecture in ARCHITECTURES
        if architecture.model_type == config.model_type
    ]
    if not known:
        names = ", ".join(sorted({architecture.model_type for architecture in ARCHITECTURES}))
        raise UserError(
            f"config.json: model_type: our decoder cannot be {printable(config.model_type)}. Choose a model of {names}."
        )
    found = _settings_of(config)
    misfits = [
        [key for key, value in architecture.theirs.items() if found[key] != value]
        for architecture in known
    ]
    architecture, wrong = min(zip(known, misfits, strict=True), key=lambda pair: len(pair[1]))
    if wrong:
        key = wrong[0]
        raise UserError(
            f"config.json: {key}: our decoder knows {_shown(architecture.theirs[key])} here, found {_shown(found[key])}. Choose another model."
        )
    return architecture


def _settings_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings by dotted name; `layer_types` as one word where all layers are alike."""
    found = dict(_dotted(config.to_dict()))
    if "layer_types" in found and len(set(found["layer_types"])) == 1:
        found["layer_types"] = found["layer_types"][0]
    return found


def _architecture_of(config: ModelConfig) -> Architecture:
    """The architecture that has all settings of this decoder."""
    misfits = [list(_misfits(config, architecture)) for architecture in ARCHITECTURES]
    architecture, wrong = min(
        zip(ARCHITECTURES, misfits, strict=True), key=lambda pair: len(pair[1])
    )
    if not wrong:
        return architecture
    key, found, has = wrong[0]
    raise UserError(
        f"model.{key}: {_shown(found)} is in no Hugging Face architecture that we write; the nearest, {architecture.model_type}, has {_shown(has)}. "
        "Train with that, or keep the model as a checkpoint."
    )


def _misfits(config: ModelConfig, architecture: Architecture) -> Iterator[tuple[str, Any, Any]]:
    """Each setting that the architecture cannot have: its name, what it is, what it would have to be."""
    found = _flat(config)
    must = architecture.ours | {key: limit(config) for key, limit in architecture.limits.items()}
    for key, value in must.items():
        if found[key] != value:
            yield key, found[key], value


def _flat(config: ModelConfig) -> dict[str, Any]:
    """The settings by dotted name; `moe` is a section if there is one."""
    values = config.model_dump()
    return values | dict(_dotted(values))


def _dotted(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What is in nested sections, by dotted name.

    >>> dict(_dotted({"a": 1, "b": {"c": 2}}))
    {'a': 1, 'b.c': 2}
    """
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_dotted`, one section deep."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested


def _shown(value: Any) -> str:
    """A setting as YAML and config.json have it."""
    return printable(json.dumps(value))


# --- weights ----------------------------------------------------------------------------------------------------------


def to_hf(model: Decoder) -> PreTrainedModel:
    """A Hugging Face model, in eval mode, with a copy of the weights and the same logits.

    Raises:
        UserError: no architecture here computes the same; see `hf_config`.
    """
    from transformers import AutoModelForCausalLM

    architecture = _architecture_of(model.config)
    made = AutoModelForCausalLM.from_config(
        hf_config(model.config), dtype=model.embedding.weight.dtype
    )
    weights = model.state_dict()
    theirs: dict[str, Tensor] = {}
    for ours, names, transposed in _pairs(architecture, model.config.n_layers, weights):
        parts = weights[ours].split(_rows(model.config, ours, len(weights[ours]), len(names)))
        theirs |= zip(names, (part.T for part in parts) if transposed else parts, strict=True)
    made.load_state_dict(theirs, strict=True)
    return made.eval()


def from_hf(hf_model: PreTrainedModel) -> Decoder:
    """Our decoder, in eval mode, in fp32, with a copy of a Hugging Face model's weights and the same logits.

    Raises:
        UserError: our decoder cannot compute the same; see `our_config`.
    """
    return from_weights(hf_model.config, hf_model.state_dict().__getitem__)


def from_weights(hf_config: PreTrainedConfig, weight: Callable[[str], Tensor]) -> Decoder:
    """Our decoder for a Hugging Face config, in eval mode, in fp32; `weight` gives their tensors by name, one at a time.

    Raises:
        UserError: our decoder cannot compute the same; see `our_config`.
    """
    config = our_config(hf_config)
    model = empty_decoder(config)
    ours: dict[str, Tensor] = {}
    for name, theirs, transposed in _pairs(
        _architecture_read(hf_config), config.n_layers, model.state_dict()
    ):
        if name == "head.weight" and config.tie_embeddings:  # their files need not have it
            ours[name] = ours["embedding.weight"]
            continue
        joined = cat([weight(part) for part in theirs]).float()
        ours[name] = joined.T.contiguous() if transposed else joined
    model.load_state_dict(ours, strict=True, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model.eval()


def their_shapes(hf_config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that `from_weights` asks for, and its shape.

    Raises:
        UserError: as `our_config`.
    """
    config = our_config(hf_config)
    ours = {
        name: tuple(weight.shape) for name, weight in empty_decoder(config).state_dict().items()
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, theirs, transposed in _pairs(_architecture_read(hf_config), config.n_layers, ours):
        if name == "head.weight" and config.tie_embeddings:
            continue
        for part, n_rows in zip(
            theirs, _rows(config, name, ours[name][0], len(theirs)), strict=True
        ):
            shape = (n_rows, *ours[name][1:])
            shapes[part] = shape[::-1] if transposed else shape
    return shapes


def stored_names(name: str, present: Container[str], n_experts: int) -> tuple[str, ...]:
    """The names in the files of a folder, of which `present` are there, that make up their tensor `name`, in its order.

    Files may leave out what stands before the first dot (GPT-2's do), and Mixtral's hold each expert by itself.
    """
    if name in present:
        return (name,)
    layer, _, part = name.partition("mlp.")
    older = f"{layer}block_sparse_moe."
    if part == "gate.weight" and f"{older}{part}" in present:
        return (f"{older}{part}",)
    matrices = {"experts.gate_up_proj": ("w1", "w3"), "experts.down_proj": ("w2",)}.get(part)
    if matrices is not None:
        return tuple(
            f"{older}experts.{expert}.{matrix}.weight"
            for expert in range(n_experts)
            for matrix in matrices
        )
    bare = name.partition(".")[2]
    return (bare,) if bare in present else (name,)


def _rows(config: ModelConfig, name: str, n_rows: int, n_parts: int) -> list[int]:
    """How many rows of our weight `name` each of its parts has: queries, keys and values, or gate and value."""
    if n_parts == 3:
        assert ".qkv." in name, name
        queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        return [queries, keys, keys]
    return [n_rows // n_parts] * n_parts


def _pairs(
    architecture: Architecture, n_layers: int, ours: Container[str]
) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """Each of our weights, the weights of theirs that it holds, and whether they are its transpose."""
    for module, theirs in architecture.modules.items():
        for layer in range(n_layers if "{}" in module else 1):
            for suffix in (
                "",
                ".weight",
                ".bias",
            ):  # "": the experts are one parameter, not a module
                name = module.format(layer) + suffix
                if name in ours:
                    parts = (theirs,) if isinstance(theirs, str) else theirs
                    transposed = suffix == ".weight" and module.endswith(architecture.transposed)
                    yield name, tuple(part.format(layer) + suffix for part in parts), transposed


# --- the check --------------------------------------------------------------------------------------------------------

# Of the largest logit. Both sum in another order, and fp32 has 7 digits.
TOLERANCE = 1e-4
CHECKED_POSITIONS = 64


@no_grad()
def logit_difference(ours: Decoder | HFModel, theirs: PreTrainedModel) -> float:
    """The largest difference of the two models' logits on random ids, in parts of the largest logit (of 1 where all are smaller)."""
    n_tokens = theirs.config.vocab_size
    ids = randint(
        n_tokens,
        (1, min(ours.config.max_seq_len, CHECKED_POSITIONS)),
        generator=Generator().manual_seed(0),
    )
    expected = theirs(ids).logits.float()
    difference = (ours(ids)[..., :n_tokens] - expected).abs().max() / expected.abs().max().clamp(
        min=1
    )
    return difference.item()
