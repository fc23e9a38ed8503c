"""From logits to the next token: pure functions on (B, V) tensors, in the order of their use.

    logits ─▶ penalize_repetition ─▶ penalize_generated ─▶ forbid_repeated_ngrams
              └─────────────── `apply_penalties`: the text so far ──────────────┘
           ─▶ only allowed tokens (constraint.py)
           ─▶ temperature ─▶ top_k ─▶ top_p ─▶ min_p ─▶ draw
              └───── `apply_filters`: numbers only ─────┘

A forbidden token has the logit -inf. Log-probabilities are those of the first logits: of the model
itself, before all of this. Knows nothing of text or of models.
"""


# B rows · T tokens so far · V vocabulary · n length of an n-gram

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinylm.common.errors import UserError
from tinylm.config.schema import SamplingConfig

# The smallest temperature that float32 can divide by: below about 1e-38 it would be 0, and 0 / 0 is
# NaN.
MIN_TEMPERATURE = 1e-30


class NextToken(NamedTuple):
    """The next token (B,) of each row, and its log-probability
    (B,) before penalties and filters.
    """

    ids: Tensor
    log_probs: Tensor


def next_token(
    logits: Tensor,
    context: Tensor,
    sampling: SamplingConfig,
    generators: Sequence[torch.Generator],
    n_new: int,
    allowed: Tensor | None = None,
) -> NextToken:
    """The next token of each row: the most probable one at temperature 0, else drawn.

    Args:
        logits: (B, V) in float32.
        context: (B, T) ids of the prompt and the tokens generated after it.
        generators: one per row, from `make_generator`, on the device of the logits. A row draws
            from its own generator only, so a draw depends on (seed, sample, step), not on the
            other rows of the batch.
        n_new: tokens at the end of the context that were generated.
        allowed: (B, V), whether a constraint lets a token come next; None if all may.

    Raises:
        ValueError: the logits are not finite.
        UserError: no_repeat_ngram, or the model itself, leaves a row no token.
    """
    log_probs = log_probabilities(logits)  # (B, V)
    logits = apply_penalties(logits, context, sampling, n_new)  # (B, V)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -math.inf)  # (B, V)
        if logits.amax(dim=-1).isneginf().any():
            problem = f"after {n_new} tokens, each allowed token is forbidden by another setting"
            raise UserError("constraint", problem, "Remove no_repeat_ngram")
    if sampling.temperature == 0:
        ids = logits.argmax(dim=-1)  # (B,)
    else:
        probabilities = apply_filters(logits, sampling).softmax(dim=-1)  # (B, V)
        ids = draw_tokens(probabilities, generators)  # (B,)
    return NextToken(ids, log_probs.gather(1, ids[:, None]).squeeze(1))


def draw_tokens(probabilities: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """A token (B,) of each row (B, V), with these probabilities, by its own generator.

    Of p / q, with q drawn from an exponential distribution, entry i is the largest with probability
    p_i. torch.multinomial draws so too: these are its tokens, without its checks of every row.
    """
    q = torch.empty_like(probabilities)  # (B, V)
    for row, generator in zip(q, generators, strict=True):
        row.exponential_(generator=generator)
    return (probabilities / q).argmax(dim=-1)


def log_probabilities(logits: Tensor) -> Tensor:
    """The model's own log-probabilities (B, V).

    Raises:
        ValueError: a row has a NaN or +inf, or nothing but -inf.
    """
    if not logits.amax(dim=-1).isfinite().all():
        raise ValueError(
            "the model gave logits that are not finite; "
            "its weights are damaged, or training diverged"
        )
    return logits.log_softmax(dim=-1)


def most_probable(log_probs: Tensor, n: int) -> list[tuple[tuple[int, float], ...]]:
    """The n most probable tokens of each row (B, V) and their log-probabilities, the best first.

    >>> most_probable(torch.tensor([[-2.0, -0.5, -1.0]]), 2)
    [((1, -0.5), (2, -1.0))]
    """
    best = log_probs.topk(min(n, log_probs.size(1)), dim=-1)  # (B, n)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [tuple(zip(ids, values, strict=True)) for ids, values in rows]


def make_generator(seed: int, sample: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of sample number `sample`."""
    # A hash: torch's CPU generator uses only the low 32 bits of its seed, so that seed + 2^32 ·
    # sample would give all samples the same numbers.
    digest = hashlib.sha256(f"{seed} {sample}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "little"))


# --- penalties: they depend on the text so far ----------------------------------------------------


def has_penalties(sampling: SamplingConfig) -> bool:
    """Whether `apply_penalties` changes anything."""
    return (
        sampling.repetition_penalty != 1
        or sampling.presence_penalty != 0
        or sampling.frequency_penalty != 0
        or sampling.no_repeat_ngram is not None
    )


def apply_penalties(
    logits: Tensor, context: Tensor, sampling: SamplingConfig, n_new: int
) -> Tensor:
    """The logits after all penalties and without the forbidden n-grams.

    The last `n_new` tokens of the context (B, T) were generated; the others are the prompt.
    """
    if sampling.repetition_penalty != 1:
        logits = penalize_repetition(logits, context, sampling.repetition_penalty)
    presence, frequency = sampling.presence_penalty, sampling.frequency_penalty
    if presence != 0 or frequency != 0:
        generated = context[:, context.size(1) - n_new :]  # (B, n_new)
        logits = penalize_generated(logits, generated, presence, frequency)
    if sampling.no_repeat_ngram is not None:
        logits = forbid_repeated_ngrams(logits, context, sampling.no_repeat_ngram)
        if logits.amax(dim=-1).isneginf().any():
            n, length = sampling.no_repeat_ngram, context.size(1)
            problem = f"{n} leaves no possible token after {length} tokens"
            raise UserError("no_repeat_ngram", problem, "Raise it or lower max_new_tokens")
    return logits


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Tokens among `seen` (B, T) made less probable: positive logits divided,
    negative ones multiplied.

    Keskar et al. 2019, section 4.1, divide all logits, which would reward tokens with negative
    ones.

    >>> penalize_repetition(torch.tensor([[4.0, -4.0, 1.0]]), torch.tensor([[0, 1, 1]]), 2.0).tolist()
    [[2.0, -8.0, 1.0]]
    """
    scores = logits.gather(1, seen)  # (B, T); a token seen twice is read and written twice, alike
    penalized = torch.where(scores > 0, scores / penalty, scores * penalty)
    return logits.scatter(1, seen, penalized)  # (B, V)


def penalize_generated(
    logits: Tensor, generated: Tensor, presence: float, frequency: float
) -> Tensor:
    """From the logit of each token among `generated` (B, T), `presence` is subtracted once,
    and `frequency` for each time that it is there.

    OpenAI's API reference defines them so; the prompt does not count.

    >>> penalize_generated(torch.zeros(1, 3), torch.tensor([[0, 1, 1]]), 0.5, 0.25).tolist()
    [[-0.75, -1.0, 0.0]]
    """
    ones = torch.ones_like(generated, dtype=logits.dtype)  # (B, T)
    counts = torch.zeros_like(logits).scatter_add(1, generated, ones)  # (B, V)
    return logits - presence * (counts > 0) - frequency * counts


def forbid_repeated_ngrams(logits: Tensor, context: Tensor, n: int) -> Tensor:
    """-inf for each token that would complete an n-gram that `context` (B, T) already contains.

        n = 2, context 1 2 3 1:    1 was followed by 2, so 2 is forbidden

    >>> forbid_repeated_ngrams(torch.zeros(1, 4), torch.tensor([[1, 2, 3, 1]]), 2).tolist()
    [[0.0, 0.0, -inf, 0.0]]
    """
    length = context.size(1)
    if length < n:
        return logits
    # All n-grams so far, and the last n - 1 tokens, which the next token would complete.
    ngrams = context.unfold(1, n, 1)  # (B, T-n+1, n)
    prefix = context[:, length - n + 1 :]  # (B, n-1)
    # Where an n-gram begins with this prefix, its last token is forbidden.
    repeats = (ngrams[:, :, :-1] == prefix[:, None]).all(dim=-1)  # (B, T-n+1)
    rows, starts = repeats.nonzero(as_tuple=True)
    logits = logits.clone()
    logits[rows, ngrams[rows, starts, -1]] = -math.inf
    return logits


# --- filters: they depend on the numbers alone ----------------------------------------------------


def apply_filters(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """The logits after temperature, top_k, top_p and min_p; at least one token per row remains."""
    logits = divide_by_temperature(logits, sampling.temperature)
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def divide_by_temperature(logits: Tensor, temperature: float) -> Tensor:
    """The logits, with 0 as the largest, divided by the temperature: below 1 sharper,
    above 1 flatter.
    """
    # Shifted first: a tiny temperature then sends the others to -inf, and none to +inf.
    return (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, MIN_TEMPERATURE)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The k most probable tokens of each row, exactly k also among equals; the others -inf.

    >>> keep_top_k(torch.tensor([[1.0, 3.0, 2.0]]), 2).tolist()
    [[-inf, 3.0, 2.0]]
    """
    best = logits.topk(min(k, logits.size(-1)), dim=-1)  # (B, k)
    return torch.full_like(logits, -math.inf).scatter(1, best.indices, best.values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The most probable tokens that together reach p, including the one that crosses it;
    the others -inf.

    Nucleus sampling (Holtzman et al. 2020, section 3.1).

    >>> keep_top_p(torch.tensor([[0.5, 0.2, 0.3]]).log(), 0.6).softmax(-1).tolist()
    [[0.625, 0.0, 0.375]]
    """
    if p == 1:  # rounding must not cut off a tail that nobody asked to remove
        return logits
    # Sort, and add the probabilities up.
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)  # (B, V)
    probabilities = ordered.softmax(dim=-1)  # (B, V)
    # (B, V): the sum of all more probable ones.
    before = probabilities.cumsum(dim=-1) - probabilities
    # Cut off a token if those before it reach p already; never the first, even if p is nearly 0.
    cut = before >= p
    cut[:, 0] = False
    # Back to the order of the vocabulary.
    return torch.empty_like(logits).scatter(1, order, ordered.masked_fill(cut, -math.inf))


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """The tokens at least `min_p` times as probable as the best one; the others -inf
    (Nguyen et al. 2024).

    >>> keep_min_p(torch.tensor([[0.5, 0.2, 0.3]]).log(), 0.5).softmax(-1).tolist()
    [[0.625, 0.0, 0.375]]
    """
    # p >= min_p · p_max, in logits: z >= z_max + log min_p
    threshold = logits.amax(dim=-1, keepdim=True) + math.log(min_p)  # (B, 1)
    return logits.masked_fill(logits < threshold, -math.inf)
