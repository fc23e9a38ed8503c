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
"""


# B batch · T new positions · S filled slots · G key/value heads · K head width

import torch
from torch import Tensor

from tinylm.config.schema import ModelConfig


class KVCache:
    """Preallocated keys and values (n_layers, B, G, slots, K): G heads per layer,
    never expanded to the H query heads.

    All rows of the batch are at the same position; `length` counts the positions written so far.
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
        window = config.sliding_window
        self.slots = max_len if window is None else min(max_len, window + chunk - 1)
        # The most positions that one forward pass may add. Without a ring there is a slot for each.
        self.chunk = chunk if self.slots < max_len else max_len
        self.max_len = max_len
        self.length = 0
        shape = (config.n_layers, batch_size, config.n_kv_heads, self.slots, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.position_of_slot = torch.zeros(self.slots, dtype=torch.long, device=device)

    @property
    def filled(self) -> int:
        """Slots in use."""
        return min(self.length, self.slots)

    @property
    def key_positions(self) -> Tensor:
        """The positions (S,) whose keys are stored, in the order of their slots."""
        return self.position_of_slot[: self.filled]

    def advance(self, n_new: int) -> Tensor:
        """Reserve slots for `n_new` tokens and return their positions (T,).

        Raises:
            ValueError: they do not fit, or are more at once than the ring can take.
        """
        if self.length + n_new > self.max_len:
            raise ValueError(
                f"{self.length} + {n_new} positions do not fit in a cache of {self.max_len}"
            )
        if n_new > self.chunk:
            raise ValueError(
                f"{n_new} positions at once, but this ring cache takes at most {self.chunk}"
            )
        device = self.position_of_slot.device
        positions = torch.arange(self.length, self.length + n_new, device=device)  # (T,)
        self.length += n_new
        self.position_of_slot[positions % self.slots] = positions
        return positions

    def write(
        self, layer: int, positions: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, G, T, K) of one layer; returns all stored ones
        (B, G, S, K).
        """
        slots = positions % self.slots  # (T,)
        self.keys[layer, :, :, slots] = keys.to(self.keys.dtype)
        self.values[layer, :, :, slots] = values.to(self.values.dtype)
        return self.keys[layer, :, :, : self.filled], self.values[layer, :, :, : self.filled]

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows `rows`, in that order, repeats allowed: for samples of one prompt,
        or beams.
        """
        self.keys = self.keys[:, rows]
        self.values = self.values[:, rows]
