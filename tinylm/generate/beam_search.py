"""Beam search: the most probable of many texts that are extended in parallel
(Sutskever et al. 2014).
"""


# B live beams · V vocabulary

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tinylm.config.schema import SamplingConfig
from tinylm.generate.decoding import DecodingBatch
from tinylm.generate.output import Prompt, TextWriter, TokenOutput, find_stop
from tinylm.generate.sampling import apply_penalties, log_probabilities
from tinylm.model.decoder import Decoder
from tinylm.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class FinishedBeam:
    """A text that has ended, with its search score."""

    mean_score: float
    ids: list[int]
    log_probs: list[float]


@torch.inference_mode()
def beam_search(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: Prompt,
    sampling: SamplingConfig,
    end_ids: Collection[int],
) -> Iterator[TokenOutput]:
    """The text with the highest mean log-probability per token that `sampling.n_beams` beams find.

    Each step keeps the `n_beams` most probable continuations of the live texts. A text that ends
    (an end id, a stop string, or max_new_tokens) is set aside and its place stays empty; the search
    ends when no place is left. The best mean wins, so that a short text has no advantage for being
    short; EOS counts as a token. One beam is greedy decoding.

    Penalties and forbidden n-grams apply, and the search ranks by the penalized scores.
    Temperature, top_k, top_p, min_p and seed have no effect.
    """
    batch = DecodingBatch(model, slots=sampling.n_beams, vocab_size=tokenizer.vocab_size)
    batch.start(prompt.ids, sampling.max_new_tokens)
    device = batch.logits.device
    totals = torch.zeros(1, device=device)  # (B,) search score of each live text
    log_probs = torch.zeros(1, 0, device=device)  # (B, T) of its tokens, by the model itself
    finished: list[FinishedBeam] = []
    for step in range(1, sampling.max_new_tokens + 1):
        # Extend: the best continuations over all live texts together.
        n_places = sampling.n_beams - len(finished)
        # (B,) each
        rows, ids, totals = best_continuations(batch, totals, sampling, n_places, step - 1)
        own = log_probabilities(batch.logits[: batch.n_active])[rows, ids, None]  # (B, 1)
        log_probs = torch.cat((log_probs[rows], own), dim=1)  # (B, step)
        # Set the ended texts aside.
        live = []
        for beam, (row, token) in enumerate(zip(rows.tolist(), ids.tolist(), strict=True)):
            text = [*batch.rows[row].context[1 - step :][: step - 1], token]  # (step,)
            if step < sampling.max_new_tokens and not ends(text, tokenizer, sampling, end_ids):
                live.append(beam)
                continue
            score = totals[beam].item() / step
            finished.append(FinishedBeam(score, text, log_probs[beam].tolist()))
        if not live:
            break
        # Continue with the live ones.
        kept = torch.tensor(live, dtype=torch.long, device=device)
        totals, log_probs = totals[kept], log_probs[kept]
        batch.select(rows[kept].tolist())
        batch.decode(ids[kept].tolist())
    best = max(finished, key=lambda beam: beam.mean_score)
    writer = TextWriter(tokenizer, sampling.stop, end_ids)
    for n, (token_id, log_prob) in enumerate(zip(best.ids, best.log_probs, strict=True), start=1):
        yield writer.write(token_id, log_prob, last=n == len(best.ids))


def best_continuations(
    batch: DecodingBatch, totals: Tensor, sampling: SamplingConfig, n: int, n_new: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Row, token and total score of the `n` best continuations of texts with `n_new` new tokens;
    fewer if fewer are possible.
    """
    logits = batch.logits[: batch.n_active]  # (B, V)
    context = torch.tensor([row.context for row in batch.rows[: batch.n_active]])  # (B, T)
    penalized = apply_penalties(logits, context.to(logits.device), sampling, n_new)  # (B, V)
    scores = totals[:, None] + penalized.log_softmax(dim=-1)  # (B, V)
    best, flat = scores.flatten().topk(min(n, scores.numel()))
    possible = best > -math.inf
    flat = flat[possible]
    return flat // scores.size(1), flat % scores.size(1), best[possible]


def ends(
    ids: list[int], tokenizer: Tokenizer, sampling: SamplingConfig, end_ids: Collection[int]
) -> bool:
    """Whether a text ends with its last token: by an end id or a stop string."""
    if ids[-1] in end_ids:
        return True
    return bool(sampling.stop) and find_stop(tokenizer.decode(ids), sampling.stop) is not None
