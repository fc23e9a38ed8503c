"""The model's side of generation: prefill, decode, prefixes and the context shift, for a batch of
texts that begin and end at any step.

    start     a prompt, into a free row      ids (1, T) ─▶ cache of T positions ─▶ logits of its row
    decode    one new token per row          ids (B, 1) ─▶ one more position each ─▶ logits (B, V)
    finish    a row becomes free

Prefill is limited by arithmetic (T tokens at once), decoding by memory (all weights are read for
one token per row); the cache is what makes decoding cost one position and not T
(tinylm/model/kv_cache.py). The rows of running texts are the first ones, so that decoding reads one
block of the cache; `finish` moves the last of them into the gap.

**Prefixes.** The row of a finished text keeps its cache until another text needs it. A prompt that
begins as any row does copies that part, and only its rest is read: the next question of a chat, the
second sample of a prompt, questions after the same examples.

    row 2, finished    a b c d │ e f g        the prompt "a b c d", answered with "e f g"
    new prompt         a b c d   e f g h i    7 positions are there; h and i are read

**Context shift.** A model knows `max_seq_len` positions. When they are used up, the last half of
the context is read again from position 0, and decoding continues:

    positions  0 1 2 3 4 5 6 7          max_seq_len 8, all in use
    tokens     a b c d e f g h │ i      no position left for i
               f g h i                  the last 8 / 2 tokens again, at positions 0 to 3

The model forgets the older tokens; penalties and forbidden n-grams do not, since `context` is whole.

**Deterministic.** Matrix products round differently for another number of rows, so a text depends
in its last bits on those beside it. With `deterministic` it does not: all slots are computed at
every decode step, in use or not; prompts are read in parts of PREFILL_CHUNK, and only whole parts
are copied from other rows.
"""


# B rows of a decode step · T tokens of a prompt · V vocabulary

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tinylm.generate.lean_step import LeanStep, lean_step
from tinylm.model.decoder import Decoder

# Tokens of a prompt that are read at once in deterministic mode.
PREFILL_CHUNK = 64
# A shorter common beginning is read again, which takes about as long as copying it.
MIN_PREFIX = 8


@dataclass
class Row:
    """One text: what the model has read of it, and what another text can take over from it."""

    prompt: tuple[int, ...] = ()
    context: list[int] = field(default_factory=list)
    """all tokens so far, prompt included; in an encoder-decoder those of the decoder"""
    cached: list[int] = field(default_factory=list)
    """the tokens whose keys and values are in the cache, by position"""
    n_prefilled: int = 0
    """how many of them were read as a prompt, not one by one"""
    prompt_logits: Tensor | None = None
    """(V,) after the prompt; None if the prompt is no longer in the cache"""
    extra_inputs: dict[str, Tensor] = field(default_factory=dict)
    """the prompt for the encoder, if there is one"""
    weights_version: int = 0
    """of the model that read it"""
    last_use: int = -1
    """when the text ended; the least recently used row is given away first"""


class DecodingBatch:
    """Up to `slots` texts that are decoded together.

    `rows[:n_active]` are running and `logits[row]` are those of their next tokens; the rows after
    them are free, and keep what finished texts left in the cache.
    """

    def __init__(self, model: Decoder, *, slots: int, vocab_size: int, deterministic: bool = False):
        self.model, self.slots, self.deterministic = model, slots, deterministic
        self.vocab_size, self.limit = vocab_size, model.config.max_seq_len
        self.rows = [Row() for _ in range(slots)]
        self.n_active = 0
        # The cache grows with the texts; fixed shapes need all of it.
        self.cache = model.new_cache(*((slots, self.limit) if deterministic else (1, 1)))
        self.logits = torch.zeros(slots, vocab_size, device=model.embedding.weight.device)
        self._one_by_one = deterministic and not model.has_independent_rows
        self._clock = itertools.count()
        # Tensors that an optimizer changes in place; those of inference mode have no version.
        self._weights = [weight for weight in model.parameters() if not weight.is_inference()]
        # What is made of the weights for decoding, at the first decode step.
        self._lean: LeanStep | None = None
        self._has_looked = False
        self._version = 0

    # --- a text begins ---

    def start(self, prompt: Sequence[int], max_new_tokens: int) -> int:
        """Read a prompt into a free row, which becomes the last running one; returns its number.

        Raises:
            ValueError: the model is in training mode, no row is free, or the prompt is empty or
            longer than the context.
        """
        check_prompt(self.model, prompt)
        if self.n_active == self.slots:
            raise ValueError(f"all {self.slots} slots are in use; finish a text first")
        # An encoder-decoder reads the prompt in its encoder; its decoder begins with a start token.
        prompt = tuple(prompt)
        ids: Sequence[int] = prompt
        extra_inputs: dict[str, Tensor] = {}
        if self.model.has_encoder:
            [ids], extra_inputs = self.model.decoder_start([prompt])
        # Which row begins as this text does? Continue in it, if it is free and loses little; else
        # copy from it to the row that was free for longest.
        version = weights_version(self._weights)
        if version != self._version:
            self._lean, self._has_looked, self._version = None, False, version
        source, n_common = self._longest_prefix(prompt, ids, version)
        row = self.n_active
        free = min(range(row, self.slots), key=lambda number: self.rows[number].last_use)
        if source >= row and 2 * n_common >= len(self.rows[source].cached):
            free = source
        n_rows = len(self.cache.lengths)
        if free >= n_rows:  # a cache that grows is copied, so it doubles
            n_rows = max(free + 1, min(self.slots, 2 * n_rows))
        self.cache.reserve(n_rows, min(self.limit, len(ids) + max_new_tokens))
        self._swap(free, row)
        source = {free: row, row: free}.get(source, source)
        self.cache.copy_row(source, row, n_common)
        # Read the rest of the prompt.
        logits = self.rows[source].prompt_logits
        self.rows[row] = Row(
            prompt, list(ids), list(ids[:n_common]), n_common, None, extra_inputs, version
        )
        self.n_active += 1
        if n_common < len(ids) or logits is None:
            logits = self._prefill(row, ids[n_common:])
        self.logits[row] = self.rows[row].prompt_logits = logits
        return row

    def _longest_prefix(
        self, prompt: tuple[int, ...], ids: Sequence[int], version: int
    ) -> tuple[int, int]:
        """The row that has the most of the text's first positions in the cache, and how many."""
        best, most = self.n_active, 0
        for number, row in enumerate(self.rows):
            if not row.prompt or row.weights_version != version:
                n = 0  # nothing was read yet, or the model was trained in between
            elif row.prompt == prompt and row.prompt_logits is not None:
                n = len(ids)  # with the logits after it: nothing is left to read
            elif self.model.has_encoder:
                n = 0  # what the decoder computes depends on the whole prompt
            else:
                n = min(n_equal(row.cached, ids), len(ids) - 1)
                if self.deterministic:
                    n = min(n, row.n_prefilled) // PREFILL_CHUNK * PREFILL_CHUNK
                n = n if n >= MIN_PREFIX else 0
            if n > most and self.cache.can_shorten(number, n):
                best, most = number, n
        return best, most

    def _prefill(self, row: int, ids: Sequence[int]) -> Tensor:
        """Read ids at the end of a row; the logits (V,) after the last one."""
        cache = self.cache.rows(row, row + 1)
        # A ring cache takes a long prompt in chunks.
        chunk = min(cache.chunk, PREFILL_CHUNK) if self.deterministic else cache.chunk
        new = torch.tensor([list(ids)], device=self.logits.device)  # (1, T)
        for part in new.split(chunk, dim=1):
            features = self.model.features(part, cache=cache, **self.rows[row].extra_inputs)
        self.rows[row].cached += ids
        self.rows[row].n_prefilled = len(self.rows[row].cached)
        # Only the last position goes through the head.
        return self._logits(features.hidden[:, -1])[0]

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits (B, V) of hidden states (B, D). The head's rows beyond the vocabulary are
        padding.
        """
        return self.model.head(hidden)[:, : self.vocab_size].float()

    # --- it continues ---

    def decode(self, ids: Sequence[int]) -> None:
        """One decode step: add a token to each running row and compute the logits of the next."""
        for number, token in enumerate(ids):
            row = self.rows[number]
            if len(row.cached) == self.limit:
                self._shift_context(number)
            row.context.append(token)
            row.cached.append(token)
        if self._one_by_one:
            for number, token in enumerate(ids):
                self.logits[number] = self._decode_rows(number, [token])[0]
        elif self.deterministic:
            n_idle = self.slots - len(ids)
            self.logits[:] = self._decode_rows(0, [*ids, *[0] * n_idle])
            for number in range(len(ids), self.slots):  # the idle rows stay as they were
                self.cache.copy_row(number, number, len(self.rows[number].cached))
        else:
            self.logits[: len(ids)] = self._decode_rows(0, ids)

    def extend(self, ids: Sequence[int]) -> Tensor:
        """Add several tokens to the only running row; the logits (T, V) after each of them."""
        new = torch.tensor([list(ids)], device=self.logits.device)  # (1, T)
        features = self.model.features(new, cache=self.cache.rows(0, 1))
        self.rows[0].context += ids
        self.rows[0].cached += ids
        return self._logits(features.hidden[0])

    def shorten(self, n: int) -> None:
        """Remove the last `n` tokens, of the last `extend`, from the only running row."""
        row = self.rows[0]
        if n:
            del row.context[-n:], row.cached[-n:]
            self.cache.copy_row(0, 0, len(row.cached))

    def _decode_rows(self, start: int, ids: Sequence[int]) -> Tensor:
        """The logits (B, V) after one more token in each of the rows from `start`."""
        cache = self.cache.rows(start, start + len(ids))
        cache.fixed_shapes = self.deterministic
        new = torch.tensor(ids, device=self.logits.device)[:, None]  # (B, 1)
        if not self._has_looked:
            self._lean, self._has_looked = lean_step(self.model), True
        if self._lean is not None:
            return self._lean(new[:, 0], cache)[:, : self.vocab_size].float()
        return self._logits(self.model.features(new, cache=cache).hidden[:, -1])

    def _shift_context(self, row: int) -> None:
        """Read the last half of a text again from position 0, but for the token that follows."""
        text = self.rows[row]
        n = max(1, self.limit // 2) - 1
        self.cache.copy_row(row, row, 0)
        text.cached, text.prompt_logits = [], None
        if n:
            self._prefill(row, text.context[-n:])

    # --- it ends ---

    def finish(self, row: int) -> None:
        """Free a row; the last running one takes its number."""
        self.n_active -= 1
        self._swap(row, self.n_active)
        text = self.rows[self.n_active]
        text.last_use = next(self._clock)
        if self.deterministic and len(text.cached) == self.limit:
            # An idle row is decoded too, and needs a position for its idle token.
            text.cached.pop()
            self.cache.copy_row(self.n_active, self.n_active, len(text.cached))

    def select(self, rows: Sequence[int]) -> None:
        """Let the running rows be these, repeats allowed: the continued beams of a search."""
        chosen = torch.tensor(rows, device=self.logits.device)
        self.cache.select(chosen)
        self.logits[: len(rows)] = self.logits[chosen]
        copies = []
        for number in rows:
            row = self.rows[number]
            copies.append(replace(row, context=list(row.context), cached=list(row.cached)))
        self.rows = copies + [Row() for _ in range(self.slots - len(rows))]
        self.n_active = len(rows)

    def _swap(self, one: int, other: int) -> None:
        if one == other:
            return
        self.cache.swap_rows(one, other)
        self.rows[one], self.rows[other] = self.rows[other], self.rows[one]
        self.logits[[one, other]] = self.logits[[other, one]]


def check_prompt(model: Decoder, prompt: Sequence[int]) -> None:
    """Raise a ValueError if the model is in training mode, or the prompt empty or longer than the
    context.
    """
    if model.training:
        raise ValueError(
            "the model is in training mode, and dropout changes the text; call model.eval() first"
        )
    limit = model.config.max_seq_len
    if not 1 <= len(prompt) <= limit:
        raise ValueError(
            f"a prompt must have 1 to {limit} tokens, got {len(prompt)}; "
            "use encode_prompt or fit_prompt"
        )


def n_equal(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of equal ids at the beginning.

    >>> n_equal([1, 2, 3], [1, 2, 4, 5])
    2
    """
    n = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        n += 1
    return n


def weights_version(weights: Iterable[Tensor]) -> int:
    """A number that changes whenever weights are changed in place, as an optimizer does; but not by
    torch's fused AdamW (torch 2.13): after its steps, make a new engine.
    """
    return sum(weight._version for weight in weights)
