"""Rotary positions for a context longer than the trained one: other frequencies for the same
rotation.

Without scaling, pair i of dimensions turns by f_i = theta^(-2i/K) per position. In a text longer
than the trained context L, slow pairs reach angles that training has not shown. With a factor s:

    linear     f_i / s                                       Chen et al. 2023, "position interpolation"
    dynamic    theta · (s·n/L - (s - 1))^(K/(K-2)) for theta, in a text of n > L tokens
                                                             bloc97 and emozilla 2023, "NTK-aware";
                                                             Peng et al. 2023, section 3.3
    yarn       f_i where a pair turns more than beta_fast times in L, f_i / s where it turns less
               than beta_slow times, a line between them in i; queries and keys are multiplied by
               0.1 ln(s) + 1                                 Peng et al. 2023, sections 3.2 and 3.4
    llama3     f_i above high_freq_factor turns in L, f_i / s below low_freq_factor turns,
               a line between them in turns                  Llama 3.1 (Dubey et al. 2024, code)

Fast pairs tell neighbors apart and are trained on every angle, so yarn and llama3 leave them alone.

dynamic is the only one whose frequencies depend on the text. As in transformers, they are those of
the longest position that a forward pass sees, and a cache keeps keys as they were rotated: beyond
L, token by token gives other logits than one pass over the same text. Without training, the others
change short texts too; dynamic does not.
"""


# K head width · L original context · n length of a text

import math

import torch
from torch import Tensor

from tinylm.config.model import RopeScalingConfig


def scaled_frequencies(
    frequencies: Tensor, theta: float, scaling: RopeScalingConfig, lengths: Tensor | None
) -> Tensor:
    """The angle per position of each pair: (K/2,), or for dynamic (..., K/2).

    Args:
        frequencies: (K/2,) without scaling, fastest first.
        theta: base of their wavelengths.
        scaling: type and numbers.
        lengths: (...) for dynamic, the length n of the text of each position.
    """
    L = scaling.original_max_seq_len
    if scaling.type == "linear":
        return frequencies / scaling.factor
    assert L is not None
    if scaling.type == "dynamic":
        assert lengths is not None
        return _dynamic(frequencies, scaling.factor, lengths / L)
    if scaling.type == "yarn":
        kept = _yarn_kept(len(frequencies), theta, scaling, L).to(frequencies.device)
    else:
        turns = L * frequencies / (2 * math.pi)  # (K/2,) in the original context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # (K/2,)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _dynamic(frequencies: Tensor, factor: float, share: Tensor) -> Tensor:
    """(..., K/2) for texts of `share` (...) times the original context."""
    # theta' = theta · g^(K/(K-2)) makes f_i' = f_i · g^(-2i/(K-2)); the last pair is divided by g.
    pairs = torch.arange(len(frequencies), device=frequencies.device)
    growth = factor * share.clamp(min=1) - (factor - 1)  # (...)
    exponents = pairs / max(len(frequencies) - 1, 1)  # (K/2,): 0 to 1
    return frequencies * torch.exp(-exponents * growth.log()[..., None])


def _yarn_kept(n_pairs: int, theta: float, scaling: RopeScalingConfig, L: int) -> Tensor:
    """(K/2,) the share of each frequency that is not scaled: 1 for the fast pairs."""

    def pair_that_turns(times: float) -> float:
        """The pair, as a fraction, that turns so often in the original context."""
        return n_pairs * math.log(L / (times * 2 * math.pi)) / math.log(theta)

    # The borders are whole pairs, as in the authors' code and in transformers.
    first = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(scaling.beta_slow)), 2 * n_pairs - 1)
    ramp = (torch.arange(n_pairs) - first) / (last - first if last != first else 0.001)
    return 1 - ramp.clamp(0, 1)


def attention_factor(scaling: RopeScalingConfig) -> float:
    """What queries and keys are multiplied by (Peng et al. 2023, equation 22)."""
    if scaling.type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1


def text_lengths(positions: Tensor) -> Tensor:
    """The length (...) of the text of each position (..., T), whose rows are runs 0, 1, 2, ...

    >>> text_lengths(torch.tensor([[0, 1, 2, 0, 1]])).tolist()
    [[3, 3, 3, 2, 2]]
    """
    T = positions.size(-1)
    index = torch.arange(T, device=positions.device).expand_as(positions)
    is_last = torch.ones_like(positions, dtype=torch.bool)
    is_last[..., :-1] = positions[..., 1:] <= positions[..., :-1]
    # The next last token is the minimum, from the right, of the indices of last tokens.
    ends = torch.where(is_last, index, T).flip(-1).cummin(dim=-1).values.flip(-1)
    return positions + (ends - index) + 1
