"""Hugging Face architectures that compute what `Decoder` can compute: one table each,
read by `conversion`.

Each table has the settings that are fixed, ours and theirs, the names of the other settings, and
those of the weights. A new architecture is one more `Architecture` in `ARCHITECTURES`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tinylm.config.model import ModelConfig, MoEConfig


@dataclass(frozen=True)
class Architecture:
    """One Hugging Face architecture; a dotted name is a key in a section,
    `{}` is the number of the layer.
    """

    model_type: str
    ours: dict[str, Any]
    """settings of ModelConfig that are fixed in it"""
    theirs: dict[str, Any]
    """settings of its config.json that are fixed in our decoder"""
    settings: dict[str, str]
    """all other settings: our name to its name"""
    modules: dict[str, str | tuple[str, ...]]
    """our module to its module, or to those whose matrices are stacked in ours, top to bottom"""
    transposed: tuple[str, ...] = ()
    """our modules whose matrix is stored as (in, out) there"""
    shifted: tuple[str, ...] = ()
    """our modules whose weight is 1 more than theirs: exact for numbers that were bf16"""
    limits: dict[str, Callable[[ModelConfig], Any]] = field(default_factory=dict)
    """settings of ModelConfig that follow from other settings there"""

    def limits_of(self, config: ModelConfig) -> dict[str, Any]:
        """The values that these settings would have there."""
        limits = {key: limit(config) for key, limit in self.limits.items()}
        is_free = "query_scalar" in self.settings
        return limits if is_free else limits | {"query_scalar": config.head_dim}


# --- the architectures ---

# A section with keys of its own for each type (rope_parameters.py).
ROPE_PARAMETERS = "rope_parameters"
# The list of the types of the layers, as one word if they follow a rule, and the number in it.
LAYER_TYPES = "layer_types"
MIXED = "full_attention in every n-th layer, sliding_attention in the others"
FULL_INTERVAL = "layer_types, n"

_NO_EXTRAS = {
    "norm_placement": "pre",
    "qk_norm": False,
    "n_sinks": 0,
    "no_rope_interval": None,
    "input_scalars": False,
    "bigram_rows": 0,
    "scale_embeddings": False,
    "full_attention_interval": None,
    "rope_local_theta": None,
}

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
        "rope_scaling": ROPE_PARAMETERS,
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
    # transformers refuses a Llama whose width is not a multiple of n_heads,
    # although head_dim is given
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
    theirs={"hidden_act": "silu"},
    settings=LLAMA.settings | {"sliding_window": "sliding_window"},
    limits={},
)

_FULL = {LAYER_TYPES: "full_attention", "use_sliding_window": False}
# Three settings say which layers have a window: transformers reads layer_types,
# other programs max_window_layers.
_WINDOW = {LAYER_TYPES: "sliding_attention", "use_sliding_window": True, "max_window_layers": 0}

QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    ours=LLAMA.ours | {"bias": "qkv"},
    theirs={"hidden_act": "silu"} | _FULL,
    settings={key: value for key, value in LLAMA.settings.items() if key != "head_dim"},
    limits={"head_dim": lambda config: config.d_model / config.n_heads},
)

QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    ours=LLAMA.ours | {"qk_norm": True},
    theirs={"hidden_act": "silu", "attention_bias": False} | _FULL,
    modules=LLAMA.modules
    | {
        "blocks.{}.attention.q_norm": "model.layers.{}.self_attn.q_norm",
        "blocks.{}.attention.k_norm": "model.layers.{}.self_attn.k_norm",
    },
    limits={},
)


def _windowed(architecture: Architecture) -> Architecture:
    """The same with a sliding window in every layer."""
    ours = {key: value for key, value in architecture.ours.items() if key != "sliding_window"}
    return replace(
        architecture,
        ours=ours,
        theirs=architecture.theirs | _WINDOW,
        settings=architecture.settings | {"sliding_window": "sliding_window"},
    )


def _mixed(architecture: Architecture) -> Architecture:
    """The same with a sliding window in all but every n-th layer."""
    places = {"sliding_window": "sliding_window", "full_attention_interval": FULL_INTERVAL}
    return replace(
        architecture,
        ours={key: value for key, value in architecture.ours.items() if key not in places},
        theirs=architecture.theirs | {LAYER_TYPES: MIXED},
        settings=architecture.settings | places,
        limits=architecture.limits
        | {"full_attention_interval": lambda config: config.full_attention_interval or 6},
    )


def _with_local_theta(architecture: Architecture) -> Architecture:
    """The same with a rotary base of its own in the layers that have a window."""
    ours = {key: value for key, value in architecture.ours.items() if key != "rope_local_theta"}
    bases = {
        "rope_theta": "rope_parameters.full_attention.rope_theta",
        "rope_local_theta": "rope_parameters.sliding_attention.rope_theta",
    }
    limit = {"rope_local_theta": lambda config: config.rope_local_theta or config.rope_theta}
    return replace(
        architecture,
        ours=ours,
        settings=architecture.settings | bases,
        limits=architecture.limits | limit,
    )


# A Llama with layers of two kinds.
MINISTRAL = _mixed(replace(LLAMA, model_type="ministral", theirs={"hidden_act": "silu"}, limits={}))

MIXTRAL = Architecture(
    "mixtral",
    ours=_NO_EXTRAS | {"position": "rope", "norm": "rmsnorm", "ffn": "swiglu", "bias": "none"},
    theirs={"hidden_act": "silu"},
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

QWEN3_MOE = replace(
    MIXTRAL,
    model_type="qwen3_moe",
    ours=MIXTRAL.ours | {"qk_norm": True, "sliding_window": None},
    theirs={
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    settings={key: value for key, value in MIXTRAL.settings.items() if key != "sliding_window"}
    | {"d_ff": "moe_intermediate_size", "moe.n_experts": "num_local_experts"},
    modules=MIXTRAL.modules
    | {name: theirs for name, theirs in QWEN3.modules.items() if name not in LLAMA.modules},
)

# Queries, keys and values are one matrix there too, and so are gate and value.
PHI3 = replace(
    MISTRAL,
    model_type="phi3",
    theirs={"hidden_act": "silu"},
    settings={key: value for key, value in MISTRAL.settings.items() if key != "head_dim"}
    | {"residual_dropout": "resid_pdrop"},
    modules=LLAMA.modules
    | {
        "blocks.{}.attention.qkv": "model.layers.{}.self_attn.qkv_proj",
        "blocks.{}.ffn.up": "model.layers.{}.mlp.gate_up_proj",
    },
    limits={"head_dim": lambda config: config.d_model / config.n_heads},
)

# A list of layers that follows from no_rope_layer_interval.
NO_ROPE_LAYERS = "no_rope_layers"
BY_INTERVAL = "every no_rope_layer_interval-th"
SMOLLM3 = replace(
    LLAMA,
    model_type="smollm3",
    ours={key: value for key, value in LLAMA.ours.items() if key != "no_rope_interval"},
    theirs=LLAMA.theirs | {"use_sliding_window": False, NO_ROPE_LAYERS: BY_INTERVAL},
    settings={key: value for key, value in LLAMA.settings.items() if key != "head_dim"}
    | {"no_rope_interval": "no_rope_layer_interval"},
    limits={"head_dim": lambda config: config.d_model / config.n_heads},
)

# Norms on what each sublayer adds, and of queries and keys over all heads.
OLMO2 = replace(
    LLAMA,
    model_type="olmo2",
    ours=LLAMA.ours | {"norm_placement": "output", "qk_norm": "all_heads"},
    theirs={"hidden_act": "silu", "attention_bias": False},
    settings={key: value for key, value in LLAMA.settings.items() if key != "head_dim"},
    modules={name: theirs for name, theirs in QWEN3.modules.items() if "_norm" not in name}
    | {
        "blocks.{}.attention.q_norm": "model.layers.{}.self_attn.q_norm",
        "blocks.{}.attention.k_norm": "model.layers.{}.self_attn.k_norm",
        "blocks.{}.attention_output_norm": "model.layers.{}.post_attention_layernorm",
        "blocks.{}.ffn_output_norm": "model.layers.{}.post_feedforward_layernorm",
    },
    limits={"head_dim": lambda config: config.d_model / config.n_heads},
)

OLMO3 = _with_local_theta(_mixed(replace(OLMO2, model_type="olmo3")))

_SCALED = {"ffn": "geglu", "scale_embeddings": True}
GEMMA = replace(
    LLAMA,
    model_type="gemma",
    ours=LLAMA.ours | _SCALED,
    theirs={
        "hidden_act": "gelu_pytorch_tanh",
        "attention_bias": False,
        "use_bidirectional_attention": None,
    },
    shifted=("norm",),
    limits={},
)

# Norms around each sublayer, and layers of two kinds, each with a rotary base of its own.
GEMMA3 = replace(
    LLAMA,
    model_type="gemma3_text",
    ours=LLAMA.ours | {"norm_placement": "sandwich", "qk_norm": True} | _SCALED,
    theirs={
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "use_bidirectional_attention": False,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
    settings=LLAMA.settings | {"query_scalar": "query_pre_attn_scalar"},
    modules={**QWEN3.modules, **OLMO2.modules}
    | {
        "blocks.{}.attention_norm": "model.layers.{}.input_layernorm",
        "blocks.{}.ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
    },
    shifted=("norm",),
)
GEMMA3 = _with_local_theta(_mixed(GEMMA3))

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
        "rope_scaling": None,
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
    """GPT-2 with another activation."""
    return replace(
        GPT2, ours=GPT2.ours | {"ffn": ours}, theirs=GPT2.theirs | {"activation_function": theirs}
    )


def _without_full_layers(*architectures: Architecture) -> tuple[Architecture, ...]:
    """The same with fewer layers than the interval: all of them have the window."""
    uniform = {LAYER_TYPES: "sliding_attention"}
    return tuple(replace(one, theirs=one.theirs | uniform) for one in architectures)


# If two compute the same, export writes the first; import reads each.
ARCHITECTURES = (
    LLAMA,
    LLAMA_WITH_BIASES,
    MISTRAL,
    MINISTRAL,
    QWEN2,
    _windowed(QWEN2),
    _mixed(_windowed(QWEN2)),
    QWEN3,
    _windowed(QWEN3),
    _mixed(_windowed(QWEN3)),
    MIXTRAL,
    QWEN3_MOE,
    PHI3,
    SMOLLM3,
    OLMO2,
    OLMO3,
    GEMMA,
    GEMMA3,
    *_without_full_layers(MINISTRAL, OLMO3, GEMMA3),
    GPT2,
    _gpt2_with("silu", "silu"),
    _gpt2_with("relu2", "relu2"),
    _gpt2_with("gelu", "gelu_pytorch_tanh"),
)

# Architectures that would need more of the decoder than a switch each, and what that is.
NEED_MORE = {
    "gemma2": "it limits attention scores and logits by a tanh",
    "gemma3": "it reads images too (its text model alone, gemma3_text, is supported)",
}


def unsupported(model_type: object) -> str:
    """Why a model of this type cannot be computed by our decoder, as the problem of an error."""
    if isinstance(model_type, str) and model_type in NEED_MORE:
        return f"{model_type} is not supported by this decoder: {NEED_MORE[model_type]}"
    names = sorted({architecture.model_type for architecture in ARCHITECTURES})
    found = model_type if isinstance(model_type, str) else json.dumps(model_type)
    return f"must be one of {', '.join(names)}, got {found:.80}"
