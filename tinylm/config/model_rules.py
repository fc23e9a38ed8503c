"""The rules between the settings of a model; what a rule is, is in rules.py."""

from tinylm.config.rules import Rule

MOE = (
    Rule(
        ("top_k", "n_experts"),
        lambda moe: moe.top_k > moe.n_experts,
        "must be at most n_experts ({n_experts}), got {top_k}",
        "Lower top_k",
    ),
)

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
