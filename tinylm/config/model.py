"""The section `model`: the shape of the decoder in `tinylm/model/decoder.py`, with the rules between its
settings.

Reading order: scaled rotary positions, the mixture of experts, and `ModelConfig`, which holds both.
"""

import math
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tinylm.config.rules import Count, CountOrZero, Fraction, Number, Rule, Section, Switch

MAX_LAYERS = 1000
GATED = {"swiglu": "silu", "geglu": "gelu"}
"""the gated kinds of feed-forward, and the activation of their gate"""

# --- rotary positions in a longer context: tinylm/model/rope_scaling.py has the formulas ---

# The settings that each type uses besides `factor`.
USED = {
    "linear": (),
    "dynamic": ("original_max_seq_len",),
    "yarn": ("original_max_seq_len", "beta_fast", "beta_slow", "attention_factor"),
    "llama3": ("original_max_seq_len", "low_freq_factor", "high_freq_factor"),
}


def _only_for(name: str) -> Rule:
    """The setting `name` is only valid for the types that use it."""
    types = [type for type, names in USED.items() if name in names]
    return Rule(
        (name, "type"),
        lambda scaling: name in scaling.model_fields_set and not _may_have(scaling, name),
        f"only valid for type {' or '.join(types)} (type is {{type}})",
        "Remove it",
    )


def _may_have(scaling: "RopeScalingConfig", name: str) -> bool:
    """Whether the type uses a setting, or it has its default, as in a stored config."""
    default = type(scaling).model_fields[name].default
    return name in USED[scaling.type] or getattr(scaling, name) == default


class RopeScalingConfig(Section):
    """Rotary positions for a context that is longer than the one the weights were trained with."""

    type: Literal["linear", "dynamic", "yarn", "llama3"]
    """positions divided by factor, base by length (NTK), or each wavelength by its own part (YaRN, Llama 3.1)"""
    factor: Annotated[Number, Field(ge=1, le=1e6)]
    """how many times longer the context is than the trained one"""
    original_max_seq_len: Count | None = None
    """dynamic, yarn, llama3: the context that the weights were trained with"""
    beta_fast: Annotated[Number, Field(gt=0, le=1e6)] = 32.0
    """yarn: a pair that turns more often than this in the original context is not scaled"""
    beta_slow: Annotated[Number, Field(gt=0, le=1e6)] = 1.0
    """yarn: a pair that turns less often than this in the original context is scaled fully"""
    attention_factor: Annotated[Number, Field(gt=0, le=100)] | None = None
    """yarn: queries and keys are multiplied by it; null: 0.1 ln(factor) + 1"""
    low_freq_factor: Annotated[Number, Field(gt=0, le=1e6)] = 1.0
    """llama3: a pair that turns less often than this in the original context is scaled fully"""
    high_freq_factor: Annotated[Number, Field(gt=0, le=1e6)] = 4.0
    """llama3: a pair that turns more often than this in the original context is not scaled"""

    rules: ClassVar = (
        Rule(
            ("original_max_seq_len", "type"),
            lambda scaling: scaling.type != "linear" and scaling.original_max_seq_len is None,
            "required for type {type}",
            "Set it to the context that the weights were trained with, for example 1024",
        ),
        *(
            _only_for(name)
            for name in ("original_max_seq_len", "beta_fast", "beta_slow", "attention_factor")
        ),
        *(_only_for(name) for name in ("low_freq_factor", "high_freq_factor")),
        Rule(
            ("beta_slow", "beta_fast"),
            lambda scaling: scaling.beta_slow > scaling.beta_fast,
            "must be at most beta_fast ({beta_fast}), got {beta_slow}",
            "Change one",
        ),
        Rule(
            ("low_freq_factor", "high_freq_factor"),
            lambda scaling: scaling.low_freq_factor >= scaling.high_freq_factor,
            "must be less than high_freq_factor ({high_freq_factor}), got {low_freq_factor}",
            "Change one",
        ),
    )


# --- experts ---

MOE = (
    Rule(
        ("top_k", "n_experts"),
        lambda moe: moe.top_k > moe.n_experts,
        "must be at most n_experts ({n_experts}), got {top_k}",
        "Lower top_k",
    ),
)


class MoEConfig(Section):
    """A mixture of experts in place of each feed-forward layer
    (Shazeer et al. 2017; Jiang et al. 2024).
    """

    rules: ClassVar = MOE

    n_experts: Count = 8
    """feed-forward networks per layer"""
    top_k: Count = 2
    """experts that each token is sent to"""
    balance_coef: Annotated[Number, Field(ge=0, le=1)] = 0.01
    """weight of the load-balancing loss (Fedus et al. 2021, equation 4) in the loss"""


# --- the model ---

# Checked before null is resolved, so that an error names what was written.
MODEL = (
    Rule(
        ("depth",),
        lambda model: model.depth is not None,
        "must be null once the settings are put together; load_config replaces it by their values",
        "Remove it",
    ),
    Rule(
        ("n_heads", "d_model"),
        lambda model: model.head_dim is None and model.d_model % model.n_heads,
        "must divide d_model ({d_model}), got {n_heads}",
        "Change one, or set head_dim",
    ),
    Rule(
        ("n_kv_heads", "n_heads"),
        lambda model: model.n_kv_heads is not None and model.n_heads % model.n_kv_heads,
        "must divide n_heads ({n_heads}), got {n_kv_heads}",
        "Change one",
    ),
    Rule(
        ("head_dim",),
        lambda model: (
            model.position == "rope" and model.head_dim is not None and model.head_dim % 2
        ),
        "must be even for position rope, got {head_dim}",
        "Choose an even head_dim",
    ),
    Rule(
        ("d_model", "n_heads"),
        lambda model: (
            model.position == "rope"
            and model.head_dim is None
            and model.d_model // model.n_heads % 2
        ),
        "head_dim = d_model / n_heads = {d_model} / {n_heads} must be even for position rope",
        "Change one, or set an even head_dim",
    ),
    *(
        Rule(
            (name, "position"),
            lambda model, name=name: getattr(model, name) is not None and model.position != "rope",
            "only valid for position rope (position is {position})",
            "Remove it",
        )
        for name in ("rope_scaling", "no_rope_interval", "rope_local_theta")
    ),
    Rule(
        ("full_attention_interval", "sliding_window"),
        lambda model: model.full_attention_interval is not None and model.sliding_window is None,
        "only valid with sliding_window (it is null)",
        "Set model.sliding_window, or remove it",
    ),
    Rule(
        ("rope_local_theta", "full_attention_interval"),
        lambda model: model.rope_local_theta is not None and model.full_attention_interval is None,
        "only valid with full_attention_interval (it is null)",
        "Set model.full_attention_interval, or remove it",
    ),
    Rule(
        ("init", "norm_placement"),
        lambda model: (
            model.init == "zero_outputs" and model.norm_placement in ("output", "sandwich")
        ),
        "zero_outputs cannot be combined with norm_placement {norm_placement}, "
        "whose norm of an all-zero output has a gradient of 1 / sqrt(norm_eps)",
        "Set model.init=normal or trunc_normal, or model.norm_placement=pre",
    ),
)


class ModelConfig(Section):
    """The shape of the decoder in `tinylm/model/decoder.py`."""

    rules: ClassVar = MODEL

    vocab_size: Count | None = None
    """rows of the embedding; null: the tokenizer's size (a multiple of 64 can be faster on a GPU)"""
    max_seq_len: Count = 1024
    """context length: the largest number of positions"""
    depth: Annotated[Count, Field(le=MAX_LAYERS)] | None = None
    """n_layers of a new model, and by the rules below its width, heads, batch, rates and decay; null: as written"""
    n_layers: Annotated[Count, Field(le=MAX_LAYERS)] = 6
    """decoder blocks"""
    d_model: Count = 384
    """width of the residual stream"""
    n_heads: Count = 6
    """query heads per layer"""
    n_kv_heads: Count | None = None
    """key/value heads per layer; null: n_heads (MHA); 1: multi-query; between: grouped-query (Ainslie et al. 2023)"""
    head_dim: Count | None = None
    """width of one head; null: d_model / n_heads"""
    ffn: Literal["swiglu", "geglu", "silu", "gelu", "relu2"] = "swiglu"
    """feed-forward: gated SiLU or GELU (Shazeer 2020), or one hidden layer: SiLU, GELU (tanh form) or squared ReLU"""
    d_ff: Count | None = None
    """hidden width of the feed-forward; null: 8/3 d_model rounded up to a multiple of 64 if gated, else 4 d_model"""
    position: Literal["rope", "learned", "alibi", "none"] = "rope"
    """positions: rotary (Su et al. 2021), learned, linear biases (Press et al. 2021), or none"""
    rope_theta: Annotated[Number, Field(gt=1, le=1e12)] = 10000.0
    """base of RoPE's wavelengths"""
    rope_scaling: RopeScalingConfig | None = None
    """frequencies of RoPE for a context longer than the trained one; null: not scaled"""
    rope_local_theta: Annotated[Number, Field(gt=1, le=1e12)] | None = None
    """base of RoPE in layers with a window, there without rope_scaling (Gemma 3); null: as in the other layers"""
    no_rope_interval: Annotated[Count, Field(ge=2)] | None = None
    """every n-th layer has no rotary positions (Yang et al. 2025), as in SmolLM3; null: all layers have them"""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm (Ba et al. 2016)"""
    norm_eps: Annotated[Number, Field(gt=0, le=0.1)] = 1e-5
    """added to the variance before the square root"""
    norm_placement: Literal["pre", "post", "output", "sandwich", "none"] = "pre"
    """norm before each sublayer, after each residual sum, on what it adds (OLMo 2), before and on that, or nowhere"""
    qk_norm: Switch | Literal["all_heads"] = False
    """RMS-normalize queries and keys, true: per head (Dehghani et al. 2023); all_heads: over all heads (OLMo 2)"""
    query_scalar: Count | None = None
    """attention scores are divided by the square root of it (Gemma 2); null: head_dim"""
    sliding_window: Count | None = None
    """positions that a token attends to, itself included; null: all previous ones"""
    full_attention_interval: Annotated[Count, Field(ge=2)] | None = None
    """every n-th layer attends to all previous positions (Gemma 3); null: all layers have sliding_window"""
    n_sinks: Annotated[CountOrZero, Field(le=1024)] = 0
    """learned key/value slots that every position attends to, also outside the window (after Xiao et al. 2023)"""
    moe: MoEConfig | None = None
    """mixture of experts; null: one dense feed-forward per layer"""
    attention_dropout: Fraction = 0.0
    """dropout on attention weights"""
    residual_dropout: Fraction = 0.0
    """dropout on the embedding and on the output of each sublayer"""
    bias: Literal["none", "qkv", "all"] = "none"
    """biases of the linear layers: none, query/key/value (Qwen2), or all but the head (GPT-2)"""
    tie_embeddings: Switch = True
    """use one matrix for the embedding and the output head (Press and Wolf 2017)"""
    scale_embeddings: Switch = False
    """multiply the embedding of a token by sqrt(d_model) (Vaswani et al. 2017, section 3.4)"""
    input_scalars: Switch = False
    """each block reads a learned multiple of the residual stream plus one of the embedding (Karpathy 2025, nanochat)"""
    bigram_rows: Annotated[CountOrZero, Field(le=2**24)] = 0
    """rows of a hashed embedding of each token with the one before, added to its own (Huang et al. 2025); 0: none"""
    init: Literal["normal", "trunc_normal", "zero_outputs"] = "normal"
    """normal: std 0.02; trunc_normal: std sqrt(2/(in+out)), embedding 1; zero_outputs: blocks add nothing at first"""
    gradient_checkpointing: Switch = False
    """recompute each block in the backward pass: less memory, about a third more compute"""

    @model_validator(mode="after")
    def _resolve_nulls(self) -> Self:
        """Replace null by its meaning, so that the model has one name for each width.

        A resolved setting is not in `model_fields_set`, which holds what the user has written.

        >>> ModelConfig(d_model=384, n_heads=6).d_ff, ModelConfig(d_model=384, n_heads=6, ffn="gelu").d_ff
        (1024, 1536)
        """
        gated_width = 64 * math.ceil(8 * self.d_model / (3 * 64))
        head_dim = self.head_dim or self.d_model // self.n_heads
        resolved = {
            "n_kv_heads": self.n_heads,
            "head_dim": head_dim,
            "query_scalar": head_dim,
            "d_ff": gated_width if self.ffn in GATED else 4 * self.d_model,
        }
        for name, value in resolved.items():
            if getattr(self, name) is None:
                self.__dict__[name] = value  # the fields are frozen, also for this method
                self.model_fields_set.discard(name)
        return self

    def to_dict(self) -> dict[str, Any]:
        """The settings as a plain dict; peft calls this on a model's config."""
        return self.model_dump()
