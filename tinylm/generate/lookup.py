"""Prompt look-up decoding: where a text copies from its prompt or repeats itself, several tokens
are read in one forward pass (Saxena 2023).

    text so far      … the old house was sold . Then the old house
    last N_GRAM      found before: "the old house was" was followed by "sold ."
    draft            what followed there, up to MAX_DRAFT tokens
    verify           one pass over the draft gives the logits after each of its tokens; the draft is
                     kept up to the first token that the model would not have chosen

Greedy text is as without drafts. A pass over 9 tokens takes about 2.4 times as long as one token on a
CPU, so a draft is only made where 4 tokens are equal: docs/LOG.md has the measurements.
"""

# T tokens of a pass · V vocabulary

from collections.abc import Collection, Iterator, Sequence

import torch

from tinylm.common.errors import UserError
from tinylm.config.schema import SamplingConfig
from tinylm.generate.decoding import DecodingBatch
from tinylm.generate.output import Prompt, TextWriter, TokenOutput
from tinylm.generate.sampling import next_token
from tinylm.tokenizer.base import Tokenizer

# Equal tokens before a draft is made, and the most tokens of a draft.
N_GRAM = 4
MAX_DRAFT = 8


def check_lookup(sampling: SamplingConfig, *, is_constrained: bool, deterministic: bool) -> None:
    """Raise a UserError for settings that a draft cannot be combined with."""
    problems = {
        "temperature": sampling.temperature != 0,
        "n_samples": sampling.n_samples > 1,
        "n_beams": sampling.n_beams > 1,
    }
    for setting, is_problem in problems.items():
        if is_problem:
            value = 0 if setting == "temperature" else 1
            raise UserError("lookup", f"only valid for one greedy text; set {setting} to {value}")
    if is_constrained or deterministic:
        name = "a constraint" if is_constrained else "deterministic"
        raise UserError("lookup", f"cannot be combined with {name}", "Remove one of the two")


class Drafts:
    """Where each n-gram of a text was last, and what followed it.

    >>> drafts = Drafts([1, 2, 3, 4, 5, 6, 1, 2, 3, 4])
    >>> drafts.next(8)
    [5, 6, 1, 2, 3, 4, 5, 6]
    """

    def __init__(self, ids: Sequence[int]):
        self._ids: list[int] = []
        self._following: dict[tuple[int, ...], int] = {}
        for token_id in ids:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        """Let the text continue with a token."""
        if len(self._ids) >= N_GRAM:
            self._following[tuple(self._ids[-N_GRAM:])] = len(self._ids)
        self._ids.append(token_id)

    def next(self, n: int) -> list[int]:
        """Up to `n` tokens that may follow; none if the last n-gram is new."""
        start = self._following.get(tuple(self._ids[-N_GRAM:]))
        if start is None:
            return []
        copied = self._ids[start:]
        # A text that repeats its last tokens, here `copied`, repeats them again.
        return [copied[i % len(copied)] for i in range(n)]


@torch.inference_mode()
def lookup_decoding(
    batch: DecodingBatch,
    tokenizer: Tokenizer,
    prompt: Prompt,
    sampling: SamplingConfig,
    end_ids: Collection[int],
) -> Iterator[TokenOutput]:
    """The tokens of the greedy text, in a batch of one slot."""
    batch.start(prompt.ids, sampling.max_new_tokens)
    writer = TextWriter(tokenizer, sampling.stop, end_ids)
    drafts, context = Drafts(prompt.ids), list(batch.rows[0].context)
    draft: list[int] = []
    logits = batch.logits[:1]  # (T, V), T = 1 + len(draft)
    n_new = 0
    try:
        while True:
            # Choose: a token after each position, as long as the draft agrees.
            for n_accepted in range(len(logits)):
                seen = torch.tensor([context], device=logits.device)
                row = logits[n_accepted : n_accepted + 1]
                ids, log_probs = next_token(row, seen, sampling, [], n_new)
                token_id = ids.item()
                n_new += 1
                context.append(token_id)
                drafts.add(token_id)
                last = n_new == sampling.max_new_tokens
                output = writer.write(token_id, log_probs.item(), last=last)
                yield output
                if output.finish_reason is not None:
                    return
                if n_accepted < len(draft) and draft[n_accepted] != token_id:
                    break
            batch.shorten(len(draft) - n_accepted)
            # Read it, and a draft if there is one and it fits.
            room = min(batch.limit - len(batch.rows[0].cached), batch.cache.chunk) - 1
            draft = drafts.next(min(MAX_DRAFT, room, sampling.max_new_tokens - n_new - 1))
            if draft:
                logits = batch.extend([token_id, *draft])
            else:
                batch.decode([token_id])
                logits = batch.logits[:1]
    finally:
        batch.finish(0)
