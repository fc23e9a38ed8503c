"""The cache of Hugging Face models: for each text a cache of transformers, and texts that decode
together in one, padded on the left.

    text 0    a b c d e          one batch   a b c d e   ┐ the next tokens of both are
    text 1    f g                            · · · f g   ┘ at the same place: column 5

A batch lives as long as the same texts decode: when one joins or leaves, all are cut out of it and
padded anew. Texts whose caches hold other things than keys and values (convolutions, linear
attention) are never padded.
"""

# B texts of a batch · S positions of the longest

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Cache


@dataclass(eq=False)
class HFText:
    """What transformers keeps of one text."""

    inner: Cache | None = None
    """None: nothing yet, or it is in a batch"""
    batch: PaddedBatch | None = None
    encoded_prompt: tuple[Tensor, Tensor] | None = None
    """of an encoder-decoder: the encoder's output (1, S, D), and its mask (1, S)"""


@dataclass
class PaddedBatch:
    """Texts in one cache of transformers."""

    inner: Cache
    texts: list[HFText]
    paddings: list[int]
    """empty positions before each text"""

    def mask(self, n_new: int, device: torch.device) -> Tensor:
        """1 where a text has a token, (B, S), with those that are added."""
        columns = torch.arange(self.inner.get_seq_length() + n_new)  # (S,)
        return (columns >= torch.tensor(self.paddings)[:, None]).long().to(device)


class HFCache:
    """Keys and values of the positions so far, of each row; the part of `KVCache` that generation
    uses.
    """

    def __init__(self, n_rows: int, max_len: int, new_inner: Callable[[], Cache]):
        self.new_inner = new_inner
        self.texts = [HFText() for _ in range(n_rows)]
        self.lengths = torch.zeros(n_rows, dtype=torch.long)
        self.max_len = max_len
        self.fixed_shapes = False
        """whether rows are read one by one, so that none depends on the others"""

    @property
    def chunk(self) -> int:
        """The most positions that one forward pass may add."""
        return self.max_len

    @property
    def length(self) -> int:
        """Positions of the longest row."""
        return int(self.lengths.max())

    @property
    def is_plain(self) -> bool:
        """Whether the caches hold nothing but keys and values."""
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        plain = DynamicLayer, DynamicSlidingWindowLayer
        caches = [self.inner_of(row) for row in range(len(self.texts))]
        return all(type(layer) in plain for cache in caches for layer in cache.layers)

    # --- rows ---

    def rows(self, start: int, stop: int) -> HFCache:
        """The rows start to stop - 1: a cache on the same memory, lengths included."""
        view = copy.copy(self)
        view.texts, view.lengths = self.texts[start:stop], self.lengths[start:stop]
        return view

    def can_shorten(self, row: int, length: int) -> bool:
        """Whether the first `length` positions of a row can be continued."""
        current, text = int(self.lengths[row]), self.texts[row]
        if length in (0, current):
            return True
        if length > current or text.encoded_prompt is not None:
            return False
        from transformers.cache_utils import DynamicLayer

        # Other layers have forgotten: windows the positions before them, convolutions all but few.
        # (Their `is_croppable` is true for what only a recorded cache can undo.)
        inner = text.batch.inner if text.batch else text.inner
        return inner is not None and all(type(layer) is DynamicLayer for layer in inner.layers)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Make row `target` begin as row `source`, with its first `length` positions."""
        if length == 0:
            self.texts[target] = HFText()
        else:
            inner = self.inner_of(source)
            if source != target:
                self.texts[target] = copy.deepcopy(self.texts[source])
                inner = self.inner_of(target)
            if length < self.lengths[source]:
                inner.crop(length - int(self.lengths[source]))
        self.lengths[target] = length

    def swap_rows(self, one: int, other: int) -> None:
        """Exchange the contents of two rows."""
        here, there = [one, other], [other, one]
        self.texts[one], self.texts[other] = self.texts[other], self.texts[one]
        self.lengths[here] = self.lengths[there]

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows `rows`, in that order, repeats allowed."""
        for row in range(len(self.texts)):
            self.inner_of(row)  # out of its batch
        self.texts = [copy.deepcopy(self.texts[row]) for row in rows.tolist()]
        self.lengths = self.lengths[rows.cpu()]

    def reserve(self, n_rows: int, max_len: int) -> None:
        """Make room for at least so many rows and positions."""
        n_new = max(0, n_rows - len(self.texts))
        self.texts += [HFText() for _ in range(n_new)]
        self.lengths = torch.cat((self.lengths, self.lengths.new_zeros(n_new)))
        self.max_len = max(max_len, self.max_len)

    # --- batches ---

    def inner_of(self, row: int) -> Cache:
        """The cache of one text, cut out of the batch that it may be in."""
        text = self.texts[row]
        if text.batch is not None:
            batch, number = text.batch, text.batch.texts.index(text)
            text.inner, text.batch = self.new_inner(), None
            length = int(self.lengths[row])
            for layer, theirs in enumerate(batch.inner.layers):
                one = slice(number, number + 1)
                n = min(length, theirs.keys.size(2))  # a sliding layer has the last ones only
                own = (theirs.keys[one, :, -n:], theirs.values[one, :, -n:])
                fill_layer(text.inner, layer, *own, length)
        if text.inner is None:
            text.inner = self.new_inner()
        return text.inner

    def padded_batch(self) -> PaddedBatch:
        """The batch of all rows."""
        batch = self.texts[0].batch
        if batch is not None and batch.texts == self.texts:
            return batch
        caches = [self.inner_of(row) for row in range(len(self.texts))]
        paddings = [self.length - length for length in self.lengths.tolist()]
        batch = PaddedBatch(self.new_inner(), list(self.texts), paddings)
        for number, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
            widest = max(layer.keys.size(2) for layer in layers)
            keys = torch.cat([pad_left(layer.keys, widest) for layer in layers])
            values = torch.cat([pad_left(layer.values, widest) for layer in layers])
            fill_layer(batch.inner, number, keys, values, self.length)
        for text in self.texts:
            text.inner, text.batch = None, batch
        return batch


def pad_left(x: Tensor, n: int) -> Tensor:
    """x (1, G, S, K) with n positions."""
    return F.pad(x, (0, 0, n - x.size(2), 0))


def fill_layer(cache: Cache, number: int, keys: Tensor, values: Tensor, length: int) -> None:
    """Give a layer of an empty cache the keys and values (B, G, S, K) of a text of `length`."""
    cache.update(keys, values, number)
    layer = cache.layers[number]
    layer.keys, layer.values = keys, values
    if layer.is_sliding:
        layer.cumulative_length = length
