"""From logits to the next token: pure functions on (B, V) tensors, in the order in which `next_token` applies them.

    logits ─▶ penalise_repetition ─▶ forbid_repeated_ngrams ─▶ temperature ─▶ top_k ─▶ top_p ─▶ min_p ─▶ draw

The first two depend on what has been written, the others only on the numbers. A forbidden token has the logit -inf.
Knows nothing of text or of models.
"""


# B batch · T tokens so far · V vocabulary · n length of an n-gram

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinylm.common.errors import UserError
from tinylm.config.schema import SamplingConfig

# The smallest temperature that float32 divides by: below about 1e-38 it would become 0, and 0/0 is not a number.
LEAST_TEMPERATURE = 1e-30


class Choice(NamedTuple):
    """The next token of each row, (B,), and its log-probability (B,) by the model itself: before penalties and filters."""

    ids: Tensor
    log_probs: Tensor


def next_token(
    logits: Tensor, context: Tensor, sampling: SamplingConfig, generators: Sequence[torch.Generator]
) -> Choice:
    """The next token of each row: the most probable one at temperature 0, else drawn.

    Args:
        logits: (B, V) in float32.
        context: (B, T) ids of the prompt and of what was written after it.
        generators: one for each row, from `make_generator`, on the device of the logits; each draw moves its row's on by
            the same amount, so a draw depends on (seed, sample, step) and not on who else is in the batch.

    Raises:
        ValueError: the logits are not finite numbers.
        UserError: no_repeat_ngram leaves a row no token.
    """
    log_probs = log_probabilities(logits)
    logits = constrain(logits, context, sampling)
    if sampling.temperature == 0:
        ids = logits.argmax(dim=-1)
    else:
        probabilities = narrow(logits, sampling).softmax(dim=-1)
        ids = torch.cat(
            [
                torch.multinomial(row, 1, generator=generator)
                for row, generator in zip(probabilities, generators, strict=True)
            ]
        )
    return Choice(ids, log_probs.gather(1, ids[:, None]).squeeze(1))


def log_probabilities(logits: Tensor) -> Tensor:
    """The model's own log-probabilities (B, V).

    Raises:
        ValueError: a row has a NaN or a positive infinite logit, or nothing but negative infinite ones.
    """
    if not logits.amax(dim=-1).isfinite().all():
        raise ValueError(
            "the model gave logits that are not finite numbers; its weights are damaged or it diverged in training"
        )
    return logits.log_softmax(dim=-1)


def make_generator(seed: int, sample: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The source of the draws of sample number `sample`."""
    # A hash, because torch's CPU generator keeps only the low 32 bits of its seed: seed + 2^32 * sample would be one stream.
    digest = hashlib.sha256(f"{seed} {sample}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "little"))


# --- what has been written ------------------------------------------------------------------------------------------


def constrain(logits: Tensor, context: Tensor, sampling: SamplingConfig) -> Tensor:
    """The logits after what depends on the text so far: repetition penalty and forbidden n-grams."""
    if sampling.repetition_penalty != 1:
        logits = penalise_repetition(logits, context, sampling.repetition_penalty)
    if sampling.no_repeat_ngram is not None:
        logits = forbid_repeated_ngrams(logits, context, sampling.no_repeat_ngram)
        if logits.amax(dim=-1).isneginf().any():
            n, length = sampling.no_repeat_ngram, context.size(1)
            raise UserError(
                f"no_repeat_ngram: {n} leaves no token to go on with after {length}. Raise it or lower max_new_tokens."
            )
    return logits


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Tokens among `seen` (B, T) made less probable: positive logits divided, negative ones multiplied by `penalty`.

    Keskar et al. 2019, section 4.1, divide every logit, which would reward a token whose logit is negative.

    >>> penalise_repetition(torch.tensor([[4.0, -4.0, 1.0]]), torch.tensor([[0, 1, 1]]), 2.0).tolist()
    [[2.0, -8.0, 1.0]]
    """
    scores = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(scores > 0, scores / penalty, scores * penalty))


def forbid_repeated_ngrams(logits: Tensor, context: Tensor, n: int) -> Tensor:
    """-inf for each token that would complete an n-gram that `context` (B, T) already holds.

    >>> forbid_repeated_ngrams(torch.zeros(1, 4), torch.tensor([[1, 2, 3, 1]]), 2).tolist()
    [[0.0, 0.0, -inf, 0.0]]
    """
    length = context.size(1)
    if length < n:
        return logits
    ngrams = context.unfold(1, n, 1)  # (B, T-n+1, n)
    opening = context[:, length - n + 1 :]  # (B, n-1): what the next token would complete
    repeats = (ngrams[:, :, :-1] == opening[:, None]).all(dim=-1)  # (B, T-n+1)
    rows, places = repeats.nonzero(as_tuple=True)
    logits = logits.clone()
    logits[rows, ngrams[rows, places, -1]] = -math.inf
    return logits


# --- the numbers alone ----------------------------------------------------------------------------------------------


def narrow(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """The logits after temperature, top_k, top_p and min_p; at least one token a row stays."""
    logits = divide_by_temperature(logits, sampling.temperature)
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def divide_by_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Logits whose largest is 0, divided by a temperature above 0: below 1 sharper, above 1 flatter."""
    # The largest is subtracted first: a tiny temperature then sends the others to -inf and nothing to +inf.
    return (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, LEAST_TEMPERATURE)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The k most probable tokens of each row, exactly k also among equals; the others -inf.

    >>> keep_top_k(torch.tensor([[1.0, 3.0, 2.0]]), 2).tolist()
    [[-inf, 3.0, 2.0]]
    """
    best = logits.topk(min(k, logits.size(-1)), dim=-1)
    return torch.full_like(logits, -math.inf).scatter(1, best.indices, best.values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The most probable tokens that together reach p, the one that crosses it included; the others -inf.

    Holtzman et al. 2020, section 3.1.

    >>> keep_top_p(torch.tensor([[0.5, 0.2, 0.3]]).log(), 0.6).softmax(-1).tolist()
    [[0.625, 0.0, 0.375]]
    """
    if p == 1:  # rounding must not cut the tail that was not asked to go
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    cut = probabilities.cumsum(dim=-1) - probabilities >= p  # those before it reach p already
    cut[:, 0] = False  # p may be so small that float32 has 0 for it
    return torch.empty_like(logits).scatter(1, order, ordered.masked_fill(cut, -math.inf))


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """The tokens at least `min_p` times as probable as the most probable one; the others -inf (Nguyen et al. 2024).

    >>> keep_min_p(torch.tensor([[0.5, 0.2, 0.3]]).log(), 0.5).softmax(-1).tolist()
    [[0.625, 0.0, 0.375]]
    """
    return logits.masked_fill(
        logits < logits.amax(dim=-1, keepdim=True) + math.log(min_p), -math.inf
    )
