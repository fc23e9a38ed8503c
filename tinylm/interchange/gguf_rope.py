"""Scaled rotary positions in a GGUF file.

linear and yarn are settings that llama.cpp computes with. llama3 is a tensor, `rope_freqs.weight`,
by which it divides the frequency of each pair. It has no dynamic.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tinylm.common.errors import UserError
from tinylm.config.model import RopeScalingConfig
from tinylm.config.schema import ModelConfig
from tinylm.interchange.gguf_tokenizer import USE_HF
from tinylm.model.rope_scaling import scaled_frequencies

if TYPE_CHECKING:
    from gguf import GGUFWriter

# The architectures for which llama.cpp reads the tensor of frequencies.
HAVE_FREQUENCIES = ("llama",)
FREQUENCIES = "rope_freqs.weight"


def require_expressible(config: ModelConfig, architecture: str) -> None:
    """Raise a UserError for a scaling that GGUF does not have."""
    scaling = config.rope_scaling
    if scaling is None or scaling.type == "linear":
        return
    if scaling.type == "yarn":
        for name in ("beta_fast", "beta_slow"):
            found, expected = getattr(scaling, name), RopeScalingConfig.model_fields[name].default
            if found != expected:
                problem = (
                    f"must be {expected} in a GGUF file (llama.cpp reads no other), got {found}"
                )
                raise UserError(f"model.rope_scaling.{name}", problem, USE_HF)
        return
    if scaling.type == "llama3" and architecture in HAVE_FREQUENCIES:
        return
    problem = f"type {scaling.type} is not supported in the GGUF file of a {architecture}"
    raise UserError("model.rope_scaling", problem, USE_HF)


def add_rope_scaling(writer: GGUFWriter, config: ModelConfig) -> None:
    """Write the settings of linear or yarn, and the tensor of llama3."""
    from gguf import RopeScalingType

    scaling = config.rope_scaling
    if scaling is None:
        return
    if scaling.type == "llama3":
        writer.add_tensor(FREQUENCIES, frequency_divisors(config).numpy())
        return
    writer.add_rope_scaling_type(RopeScalingType(scaling.type))
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.type == "yarn":
        assert scaling.original_max_seq_len is not None
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_seq_len)
        if scaling.attention_factor is not None:
            # llama.cpp multiplies by YaRN's own factor too
            own = 0.1 * math.log(scaling.factor) + 1
            writer.add_rope_scaling_attn_factors(scaling.attention_factor / own)


def frequency_divisors(config: ModelConfig) -> Tensor:
    """(K/2,) what the frequency of each pair is divided by, in fp32."""
    assert config.rope_scaling is not None
    assert config.head_dim is not None
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
    plain = torch.exp(pairs * (-math.log(config.rope_theta) / config.head_dim))
    scaled = scaled_frequencies(plain, config.rope_theta, config.rope_scaling, None)
    return (plain / scaled).float()
