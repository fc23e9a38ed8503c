"""The key/value cache: what attention keeps of the tokens already read,
so that each new token costs one position.

Without a cache, writing token t would compute the keys and values of all t tokens before it again.
With it, a forward pass over the new tokens alone writes their keys and values into slots and
attends over all filled slots:

    no window, max_len 8            slot      0   1   2   3   4   5   6   7
    after a prefill of 5            position  0   1   2   3   4   ·   ·   ·      length 5, filled 5
    after one decode step           position  0   1   2   3   4   5   ·   ·      length 6, filled 6

    window 4, chunk 2: 5 slots      slot      0   1   2   3   4
    after 5 tokens                  position  0   1   2   3   4                  length 5, filled 5
    after 7 tokens                  position  5   6   2   3   4                  length 7, filled 5

Position p is in slot p modulo `slots`. Under a sliding window W the slots are a ring of
W + chunk - 1: while a chunk of new positions is written, its oldest query still looks back W - 1
positions.
Older positions are overwritten, since no later query can see them. Keys are stored after the
rotation, so that a cached key is never rotated again.

**Rows.** Each row of the batch is a text of its own length. The memory is allocated once; a part of
the rows is a view of it (`rows`), so that one row can be filled while the others wait:

    slot      0   1   2   3   4   5   6   7
    row 0     a   b   c   d   e   ·   ·   ·      length 5 ┐
    row 1     f   g   ·   ·   ·   ·   ·   ·      length 2 ┴ rows(0, 2): both decode one token
    row 2     h   i   j   ·   ·   ·   ·   ·      length 3 ─ rows(2, 3): a prompt is read into it
"""


# B batch · T new positions · S filled slots · G key/value heads · K head width

import copy

import torch
from torch import Tensor

from tinylm.config.schema import ModelConfig

# The position of a slot that holds nothing yet: after every query, so that none sees it.
UNFILLED = 2**40


class KVCache:
    """Preallocated keys and values (n_layers, B, G, slots, K): G heads per layer,
    never expanded to the H query heads.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_len: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        chunk: int,
    ):
        # A layer without a window needs all positions, and all layers have the same slots.
        self.window = None if config.full_attention_interval else config.sliding_window
        self.ring_chunk = chunk
        self.fixed_shapes = False
        """whether a row is computed alike whatever the other rows are (see `row_lengths`)"""
        # Positions that each row has; on the CPU: Python decides by them.
        self.lengths = torch.zeros(batch_size, dtype=torch.long)  # (B,)
        self.max_len = max_len
        shape = (config.n_layers, batch_size, config.n_kv_heads, self.slots, config.head_dim)
        # Zeros, not empty: a masked value is multiplied by 0, and 0 · NaN is NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        # The token at each position (B, max_len), for a model that embeds pairs of tokens.
        n_ids = max_len if config.bigram_rows else 0
        self.ids = torch.zeros(batch_size, n_ids, dtype=torch.long, device=device)

    @property
    def slots(self) -> int:
        """Positions that are stored of each row."""
        if self.window is None:
            return self.max_len
        return min(self.max_len, self.window + self.ring_chunk - 1)

    @property
    def chunk(self) -> int:
        """The most positions that one forward pass may add. Without a ring there is a slot for
        each.
        """
        return self.ring_chunk if self.slots < self.max_len else self.max_len

    @property
    def length(self) -> int:
        """Positions of the longest row."""
        return int(self.lengths.max())

    @property
    def filled(self) -> int:
        """Slots in use, of the longest row."""
        return min(self.length, self.slots)

    @property
    def is_ragged(self) -> bool:
        """Whether the rows have different lengths, or are treated as if they had."""
        return self.fixed_shapes or bool((self.lengths != self.lengths[0]).any())

    # --- one forward pass: advance, then key_positions, then a write per layer ---

    def advance(self, n_new: int) -> Tensor:
        """Reserve slots for `n_new` tokens a row and return their positions:
        (T,) if they are the same for all rows, else (B, T).

        Raises:
            ValueError: they do not fit, or are more at once than the ring can take.
        """
        length = self.length
        if length + n_new > self.max_len:
            raise ValueError(
                f"{length} + {n_new} positions do not fit in a cache of {self.max_len}"
            )
        if n_new > self.chunk:
            raise ValueError(
                f"{n_new} positions at once, but this ring cache takes at most {self.chunk}"
            )
        device = self.keys.device
        if self.is_ragged:
            new = torch.arange(n_new)
            positions = (self.lengths[:, None] + new).to(device, non_blocking=True)  # (B, T)
        else:
            positions = torch.arange(length, length + n_new, device=device)  # (T,)
        self.lengths += n_new
        return positions

    @property
    def key_positions(self) -> Tensor:
        """The positions whose keys are stored, in the order of their slots: (S,) if they are
        the same for all rows, else (B, S).
        """
        slots = torch.arange(self.filled)  # (S,)
        if self.length > self.slots or (self.window is not None and self.is_ragged):
            # In a ring, slot s holds the last position p before the length with p % slots == s.
            last = self.lengths[:, None] - 1  # (B, 1)
            positions = last - (last - slots) % self.slots  # (B, S)
            positions = positions.masked_fill(positions < 0, UNFILLED)
            slots = positions if self.is_ragged else positions[0]
        return slots.to(self.keys.device, non_blocking=True)

    @property
    def row_lengths(self) -> list[int] | None:
        """The filled slots of each row, if attention takes the rows one after another;
        None: it takes them together, padded to the longest and masked.

        Apart, no row pays for the length of another, and what a row computes does not depend on
        the others. On a GPU, many small calls are slower than one padded one.
        """
        if self.fixed_shapes or (self.is_ragged and self.keys.device.type == "cpu"):
            return self.lengths.clamp(max=self.slots).tolist()
        return None

    def write(
        self, layer: int, positions: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, G, T, K) of one layer; returns all stored ones
        (B, G, S, K).
        """
        keys, values = keys.to(self.keys.dtype), values.to(self.values.dtype)
        if positions.dim() == 2:
            # Each row into its own slots. Indices at both ends move T forward: (B, T, G, K).
            row = torch.arange(len(positions), device=positions.device)[:, None]  # (B, 1)
            slots = positions % self.slots  # (B, T)
            self.keys[layer][row, :, slots] = keys.transpose(1, 2)
            self.values[layer][row, :, slots] = values.transpose(1, 2)
        else:
            T = len(positions)
            start = (self.length - T) % self.slots
            if start + T <= self.slots:
                self.keys[layer, :, :, start : start + T] = keys
                self.values[layer, :, :, start : start + T] = values
            else:  # across the seam of the ring
                slots = positions % self.slots  # (T,)
                self.keys[layer, :, :, slots] = keys
                self.values[layer, :, :, slots] = values
        return self.keys[layer, :, :, : self.filled], self.values[layer, :, :, : self.filled]

    def ids_before(self, positions: Tensor, ids: Tensor) -> Tensor:
        """Store new tokens (B, T) at their positions; the token before each one, -1 at position 0."""
        row = torch.arange(len(ids), device=ids.device)[:, None]  # (B, 1)
        self.ids[row, positions] = ids.long()
        before = self.ids[row, (positions - 1).clamp(min=0)]  # (B, T)
        return torch.where(positions == 0, -1, before)

    # --- rows ---

    def rows(self, start: int, stop: int) -> "KVCache":
        """The rows start to stop - 1: a cache on the same memory, lengths included."""
        view = copy.copy(self)
        view.keys, view.values = self.keys[:, start:stop], self.values[:, start:stop]
        view.ids, view.lengths = self.ids[start:stop], self.lengths[start:stop]
        return view

    def can_shorten(self, row: int, length: int) -> bool:
        """Whether the first `length` positions of a row can be continued: whether a ring still
        has all of them that the next query sees.
        """
        current = int(self.lengths[row])
        if self.window is None or current < self.slots:
            return length <= current
        return 0 <= current - length < self.ring_chunk

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Make row `target` begin as row `source`, with its first `length` positions;
        see `can_shorten`.
        """
        if source != target:
            n = length if self.lengths[source] <= self.slots else self.slots
            self.keys[:, target, :, :n] = self.keys[:, source, :, :n]
            self.values[:, target, :, :n] = self.values[:, source, :, :n]
            self.ids[target] = self.ids[source]
        self.lengths[target] = length

    def swap_rows(self, one: int, other: int) -> None:
        """Exchange the contents of two rows."""
        if one == other:
            return
        n = self.rows(min(one, other), max(one, other) + 1).filled
        here, there = [one, other], [other, one]
        self.keys[:, here, :, :n] = self.keys[:, there, :, :n]
        self.values[:, here, :, :n] = self.values[:, there, :, :n]
        self.ids[here], self.lengths[here] = self.ids[there], self.lengths[there]

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows `rows`, in that order, repeats allowed: for samples of one prompt,
        or beams.
        """
        self.keys = self.keys[:, rows]
        self.values = self.values[:, rows]
        self.ids, self.lengths = self.ids[rows], self.lengths[rows.cpu()]

    def reserve(self, n_rows: int, max_len: int) -> None:
        """Make room for at least so many rows and positions; what is stored stays."""
        old_keys, old_values = self.keys, self.values
        old_ids, old_lengths = self.ids, self.lengths
        n_layers, B, G, n, K = old_keys.shape
        if n_rows <= B and max_len <= self.max_len:
            return
        n_rows = max(n_rows, B)
        self.max_len = max(max_len, self.max_len)
        shape = (n_layers, n_rows, G, self.slots, K)
        self.keys, self.values = old_keys.new_zeros(shape), old_values.new_zeros(shape)
        self.keys[:, :B, :, :n] = old_keys
        self.values[:, :B, :, :n] = old_values
        self.ids = old_ids.new_zeros(n_rows, self.max_len if old_ids.size(1) else 0)
        self.ids[:B, : old_ids.size(1)] = old_ids
        self.lengths = old_lengths.new_zeros(n_rows)
        self.lengths[:B] = old_lengths
