"""The model's side of generation: prefill, decode, and the context shift.

    prefill   the whole prompt, one row      ids (1, T) ─▶ cache of T positions ─▶ logits (1, V)
    select    one row per sample or beam     cache and logits repeated, no computation
    decode    one new token per row          ids (B, 1) ─▶ cache of T + 1 positions ─▶ logits (B, V)

Prefill is limited by arithmetic (T tokens at once), decoding by memory (all weights are read for
one token per row); the cache is what makes decoding cost one position and not T
(tinylm/model/kv_cache.py).

**Context shift.** A model knows `max_seq_len` positions. When they are used up, the last half of
the context is read again from position 0, and decoding continues:

    positions  0 1 2 3 4 5 6 7          max_seq_len 8, all in use
    tokens     a b c d e f g h │ i      no position left for i
               f g h i                  the last 8 / 2 tokens again, at positions 0 to 3

The model forgets the older tokens; repetition penalty and forbidden n-grams do not, since `context`
is whole.

All rows are at the same position and belong to one prompt. Nothing outside this class knows rows,
positions or the cache, so a batch of different prompts is a change of this class.
"""


# B rows (samples or beams) · T tokens so far · V vocabulary

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylm.model.decoder import Decoder


class DecodingState:
    """B rows of token ids of one length, the cache of what the model has read,
    and the next token's logits.

    Construction is the prefill: it reads the prompt as one row.

    Raises:
        ValueError: the model is in training mode, or the prompt is empty or longer than the
        context.
    """

    def __init__(
        self, model: Decoder, prompt_ids: Sequence[int], *, vocab_size: int, max_new_tokens: int
    ):
        if model.training:
            raise ValueError(
                "the model is in training mode, and dropout changes the text; "
                "call model.eval() first"
            )
        limit = model.config.max_seq_len
        if not 1 <= len(prompt_ids) <= limit:
            raise ValueError(
                f"a prompt must have 1 to {limit} tokens, got {len(prompt_ids)}; "
                "use encode_prompt or fit_prompt"
            )
        self.model, self.vocab_size = model, vocab_size
        # An encoder-decoder reads the prompt in its encoder; its decoder begins with a start token.
        ids: Sequence[int] = prompt_ids
        self.extra_inputs: dict[str, Tensor] = {}
        if model.has_encoder:
            [ids], self.extra_inputs = model.decoder_start([prompt_ids])
        self.n_prompt = self.length = len(ids)
        # Room for the ids (B, room), of which `length` are used.
        self.buffer = torch.tensor([list(ids)], device=model.embedding.weight.device)
        # No more slots than this text can use.
        self.max_len = min(limit, len(ids) + max_new_tokens)
        self.cache = model.new_cache(1, self.max_len)
        self.logits = self._forward(self.length)  # (1, V)

    @property
    def context(self) -> Tensor:
        """All tokens so far (B, T), prompt included."""
        return self.buffer[:, : self.length]

    @property
    def generated(self) -> Tensor:
        """The tokens after the prompt (B, T)."""
        return self.buffer[:, self.n_prompt : self.length]

    def decode(self, ids: Tensor) -> None:
        """One decode step: add a token (B,) to each row and compute the logits of the next."""
        if self.length == self.buffer.size(1):
            # Doubling the room keeps the total copying linear in the length.
            self.buffer = F.pad(self.buffer, (0, self.length))
        self.buffer[:, self.length] = ids
        self.length += 1
        self.logits = self._forward(1)  # (B, V)

    def select(self, rows: Tensor) -> None:
        """Keep these rows in this order, repeats allowed: samples of one prompt,
        or unfinished texts.
        """
        self.buffer, self.logits = self.buffer[rows], self.logits[rows]
        self.cache.select(rows)

    def _forward(self, n_new: int) -> Tensor:
        """Run the last `n_new` tokens through the model; logits (B, V) of the token after them."""
        if self.cache.length + n_new > self.max_len:
            # Context shift: a fresh cache, with the last half of the context.
            n_new = max(1, self.max_len // 2)
            self.cache = self.model.new_cache(self.buffer.size(0), self.max_len)
        # A ring cache takes a long prompt in chunks.
        for ids in self.context[:, -n_new:].split(self.cache.chunk, dim=1):
            features = self.model.features(ids, cache=self.cache, **self.extra_inputs)
        # Only the last position goes through the head. Its rows beyond the vocabulary are padding.
        logits = self.model.head(features.hidden[:, -1])  # (B, V or more)
        return logits[:, : self.vocab_size].float()
