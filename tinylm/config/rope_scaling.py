"""Settings of scaled rotary positions: the section `model.rope_scaling`.

tinylm/model/rope_scaling.py has the formulas.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tinylm.config.rules import Count, Number, Rule, Section

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
