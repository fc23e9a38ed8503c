"""Scaled rotary positions in a Hugging Face config: `rope_parameters`, and older `rope_scaling`.

model.rope_scaling ─ their_parameters ─▶ rope_parameters ─ our_settings ─▶ model.rope_scaling
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from tinylm.common.errors import UserError
from tinylm.config.model import USED, RopeScalingConfig
from tinylm.config.schema import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Our name to theirs, if it is another one.
THEIRS = {"type": "rope_type", "original_max_seq_len": "original_max_position_embeddings"}
# What transformers takes if a number is missing.
OPTIONAL = ("attention_factor", "beta_fast", "beta_slow")
# Keys that change nothing with these values.
HARMLESS = {"partial_rotary_factor": 1.0, "truncate": True}


def their_parameters(config: ModelConfig, *, by_layer: bool = False) -> dict[str, Any]:
    """`rope_parameters` for the decoder's rotary positions; `by_layer` for each type of layer."""
    if by_layer:
        local = {"rope_type": "default", "rope_theta": config.rope_local_theta}
        return {"full_attention": their_parameters(config), "sliding_attention": local}
    scaling = config.rope_scaling
    theta = {"rope_theta": config.rope_theta}
    if scaling is None:
        return {"rope_type": "default"} | theta
    # dynamic: the original context is max_position_embeddings
    used = () if scaling.type == "dynamic" else USED[scaling.type]
    names = ("type", "factor", *used)
    found = {THEIRS.get(name, name): getattr(scaling, name) for name in names}
    return {name: value for name, value in found.items() if value is not None} | theta


def their_context(config: ModelConfig) -> int:
    """`max_position_embeddings`: the original context for dynamic, whose readers multiply it."""
    scaling = config.rope_scaling
    if scaling is not None and scaling.type == "dynamic":
        assert scaling.original_max_seq_len is not None
        return scaling.original_max_seq_len
    return config.max_seq_len


def our_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """`rope_scaling` and `max_seq_len` of the decoder that rotates as a model with this config.

    Raises:
        UserError: it scales in another way; it names the key.
    """
    found = dict(config.rope_parameters)
    if "full_attention" in found:
        found, local = dict(found["full_attention"]), found["sliding_attention"]
        if (type := local.get("rope_type", "default")) != "default":
            raise _error("sliding_attention.rope_type", f"must be default, got {json.dumps(type)}")
    context = config.max_position_embeddings
    type = found.pop("rope_type", "default")
    found.pop("rope_theta")
    if type == "default":
        _refuse_others(found, type)
        return {"rope_scaling": None, "max_seq_len": context}
    if type not in USED:
        known = ", ".join(("default", *USED))
        raise _error("rope_type", f"must be one of {known}, got {json.dumps(type)}")
    if type == "dynamic":  # transformers does not read another one
        found["original_max_position_embeddings"] = context
        context = round(context * found["factor"])
    if type == "linear":
        found.pop("original_max_position_embeddings", None)
    if type == "yarn":
        _join_scales(found)
    scaling = {"type": type}
    for name in ("factor", *USED[type]):
        value = found.pop(THEIRS.get(name, name), None)
        if value is not None:
            scaling[name] = float(value) if name in OPTIONAL else value
        elif name not in OPTIONAL:
            raise _error(THEIRS.get(name, name), f"required for {type}")
    _refuse_others(found, type)
    RopeScalingConfig.model_validate(scaling)
    return {"rope_scaling": scaling, "max_seq_len": context}


def _join_scales(found: dict[str, Any]) -> None:
    """Replace DeepSeek's two factors by the quotient of them, as transformers does."""
    above, below = found.pop("mscale", None), found.pop("mscale_all_dim", None)
    if found.get("attention_factor") is None and above and below:
        size = 0.1 * math.log(found["factor"])
        found["attention_factor"] = (size * above + 1) / (size * below + 1)


def _refuse_others(found: dict[str, Any], type: str) -> None:
    """Raise a UserError for a key that no formula of the type here has."""
    for name, value in found.items():
        if HARMLESS.get(name, value if value is None else ...) != value:
            raise _error(name, f"{json.dumps(value)} is not supported with rope_type {type}")


def _error(key: str, problem: str) -> UserError:
    return UserError(("config.json", f"rope_parameters.{key}"), problem, "Choose another model")
