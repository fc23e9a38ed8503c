"""How well a model expects given texts: log-probability
and rank of each token of a target after a prompt.

    prompt, target ─▶ Continuation: ids that fit ─▶ padded batches ─▶ ContinuationScore
    prompt ─▶ `score_prompts` ─▶ ScoredToken, ScoredToken, ...   (`echo` of a server)

Used by evaluation (cases, multiple-choice tasks, lm_eval) and servers. Nothing is generated here.
Log-probabilities are those of the model itself: no temperature, no penalties.
"""


# B pairs of a batch · T tokens of a pair · N target and prompt tokens of all pairs · V vocabulary

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tinylm.common.errors import UserError
from tinylm.generate.engine import Engine
from tinylm.generate.output import Prompt
from tinylm.generate.sampling import log_probabilities, most_probable

# Positions that go through the head at a time: all logits of a long context would be the largest
# tensor by far.
HEAD_CHUNK = 256


@dataclass(frozen=True)
class Continuation:
    """A prompt and the target text after it, as the token ids that the model reads together."""

    ids: tuple[int, ...]
    n_target: int
    """number of ids at the end that are the target"""
    truncated: int = 0
    """tokens cut off at the front of the prompt because the context holds no more"""


@dataclass(frozen=True)
class ContinuationScore:
    """How well a model expects a given text after a prompt."""

    log_probs: tuple[float, ...]
    """natural log-probability of each token of the target"""
    ranks: tuple[int, ...]
    """rank of each token of the target among all tokens, 1 for the most probable"""
    prompt_perplexity: float | None
    """of the prompt's tokens after its first; None if the prompt has fewer than two"""
    alternatives: tuple[tuple[tuple[int, float], ...], ...] = ()
    """for each token of the target the most probable tokens in its place and their
    log-probabilities, if they were asked for"""

    @property
    def log_prob(self) -> float:
        """Log-probability of the whole target."""
        return sum(self.log_probs)

    @property
    def n_tokens(self) -> int:
        """Tokens of the target."""
        return len(self.log_probs)

    @property
    def greedy_match(self) -> bool:
        """Whether greedy decoding would generate exactly the target."""
        return all(rank == 1 for rank in self.ranks)


@dataclass(frozen=True)
class ScoredToken:
    """A token of a prompt, as the model expects it after the tokens before it."""

    token_id: int
    log_prob: float | None
    """None for the first token, which has none before it"""
    alternatives: tuple[tuple[int, float], ...]
    """the most probable tokens in its place and their log-probabilities"""


def encode_continuation(engine: Engine, prompt: str | Prompt, target: str) -> Continuation:
    """Prompt and target, each encoded separately; an empty prompt is EOS.

    Raises:
        UserError: the target has no token, or more than the context holds.
    """
    tokenizer = engine.tokenizer
    if not isinstance(prompt, Prompt):
        prompt = Prompt(tuple(tokenizer.encode(prompt) or [tokenizer.eos_id]))
    pair = fit_continuation(engine, prompt.ids, tokenizer.encode(target))
    return replace(pair, truncated=pair.truncated + prompt.truncated)


def fit_continuation(
    engine: Engine, prompt_ids: Sequence[int], target_ids: Sequence[int]
) -> Continuation:
    """The target after the last prompt ids that fit, at least one;
    raises as `encode_continuation`.
    """
    if not prompt_ids:
        raise ValueError("a target needs at least one token before it; use EOS for an empty prompt")
    limit = engine.model.config.max_seq_len
    if not 1 <= len(target_ids) <= limit:
        problem = f"must have 1 to {limit} tokens, got {len(target_ids)}"
        raise UserError("target", problem, "Change the target")
    # One more than the context: the last token is only predicted, never read.
    ids = (*prompt_ids, *target_ids)[-limit - 1 :]
    return Continuation(ids, len(target_ids), len(prompt_ids) + len(target_ids) - len(ids))


@torch.inference_mode()
def score_continuations(
    engine: Engine,
    pairs: Sequence[Continuation],
    *,
    batch_size: int = 16,
    n_alternatives: int = 0,
) -> list[ContinuationScore]:
    """The scores, in the order of `pairs`; pairs of similar length are read together."""
    # The longest first: what does not fit in memory fails at once.
    order = sorted(range(len(pairs)), key=lambda index: -len(pairs[index].ids))
    scores: dict[int, ContinuationScore] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        found = _score_batch(engine, [pairs[index] for index in batch], n_alternatives)
        scores.update(zip(batch, found, strict=True))
    return [scores[index] for index in range(len(pairs))]


def score_prompts(
    engine: Engine, prompts: Sequence[Prompt], *, batch_size: int = 16, n_alternatives: int = 0
) -> list[list[ScoredToken]]:
    """The tokens of each prompt with their log-probabilities.

    Raises:
        UserError: the model is an encoder-decoder, whose encoder reads the prompt as a whole.
    """
    if engine.model.has_encoder:
        problem = "an encoder-decoder gives the tokens of a prompt no probabilities"
        raise UserError("echo", problem, "Choose a decoder, or ask without echo")
    pairs = []
    for prompt in prompts:
        if len(prompt.ids) > 1:  # after its first token, the rest of a prompt is a target
            pairs.append(fit_continuation(engine, prompt.ids[:1], prompt.ids[1:]))
    scores = score_continuations(
        engine, pairs, batch_size=batch_size, n_alternatives=n_alternatives
    )
    following = iter(scores)
    results = []
    for prompt in prompts:
        tokens = [ScoredToken(prompt.ids[0], None, ())]
        if len(prompt.ids) > 1:
            score = next(following)
            rows = zip(prompt.ids[1:], score.log_probs, score.alternatives, strict=True)
            tokens += [ScoredToken(*row) for row in rows]
        results.append(tokens)
    return results


def _score_batch(
    engine: Engine, pairs: Sequence[Continuation], n_alternatives: int
) -> list[ContinuationScore]:
    """Rows are padded on the right: under causal attention a real token never sees padding."""
    model, tokenizer = engine.model, engine.tokenizer
    device = model.embedding.weight.device
    # An encoder-decoder reads the prompts in its encoder.
    prompts: Sequence[Sequence[int]] = [pair.ids[: -pair.n_target] for pair in pairs]
    extra_inputs: dict[str, Tensor] = {}
    if model.has_encoder:
        prompts, extra_inputs = model.decoder_start(prompts)
    rows = []
    for prompt, pair in zip(prompts, pairs, strict=True):
        rows.append(torch.tensor((*prompt, *pair.ids[-pair.n_target :])))
    lengths = torch.tensor([len(row) - 1 for row in rows])  # (B,) positions that predict a token
    padded = torch.nn.utils.rnn.pad_sequence(rows, True, tokenizer.eos_id).to(device)  # (B, T + 1)
    inputs, labels = padded[:, :-1], padded[:, 1:]  # (B, T)
    real = (torch.arange(inputs.size(1)) < lengths[:, None]).to(device)  # (B, T)
    # One forward pass, then the head and the scores in chunks of positions.
    hidden = model.features(inputs, **extra_inputs).hidden[real]  # (N, D)
    targets = labels[real]  # (N,)
    all_log_probs, all_ranks = [], []
    all_best: list[tuple[tuple[int, float], ...]] = []  # of each of N tokens
    chunks = zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True)
    for hidden_chunk, target_chunk in chunks:
        logits = model.head(hidden_chunk)[:, : tokenizer.vocab_size].float()  # (chunk, V)
        log_probs = log_probabilities(logits)  # (chunk, V)
        all_log_probs.append(log_probs.gather(1, target_chunk[:, None]).squeeze(1))
        all_ranks.append(_ranks(logits, target_chunk))
        all_best += most_probable(log_probs, n_alternatives)
    # Back to one row per pair.
    of_pair = zip(
        pairs,
        torch.cat(all_log_probs).split(lengths.tolist()),
        torch.cat(all_ranks).split(lengths.tolist()),
        lengths.cumsum(0).tolist(),
        strict=True,
    )
    scores = []
    for pair, log_probs, ranks, end in of_pair:
        best = tuple(all_best[end - pair.n_target : end])
        scores.append(_continuation_score(pair, log_probs, ranks, best))
    return scores


def _ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """The rank (T,) of each label; of equal logits the lower id ranks first."""
    chosen = logits.gather(1, labels[:, None])  # (T, 1)
    ids = torch.arange(logits.size(1), device=logits.device)  # (V,)
    better = (logits > chosen) | ((logits == chosen) & (ids < labels[:, None]))  # (T, V)
    return better.sum(dim=1) + 1


def _continuation_score(
    pair: Continuation,
    log_probs: Tensor,
    ranks: Tensor,
    alternatives: tuple[tuple[tuple[int, float], ...], ...],
) -> ContinuationScore:
    """The score from log-probability and rank of every token of the pair but the first."""
    of_prompt = log_probs[: -pair.n_target]
    perplexity = math.exp(-of_prompt.mean().item()) if len(of_prompt) else None
    return ContinuationScore(
        log_probs=tuple(log_probs[-pair.n_target :].tolist()),
        ranks=tuple(ranks[-pair.n_target :].tolist()),
        prompt_perplexity=perplexity,
        alternatives=alternatives,
    )
