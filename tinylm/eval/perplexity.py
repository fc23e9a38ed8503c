"""How well a model predicts a text: loss, perplexity, bits per byte, accuracy.

    batch ─▶ 4 sums (`batch_sums`) ─▶ added over all batches ─▶ divided once (`language_score`)

A mean of per-batch means, or of per-batch perplexities,
would weight a short last batch like a full one.

# B rows · T tokens · V vocabulary
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinylm.model.decoder import Decoder, Features, Head, extra_inputs
from tinylm.objectives.cross_entropy import score_targets
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.packing import IGNORE_INDEX

# exp(20) is 4.9e8, far worse than a uniform guess over any vocabulary. A higher perplexity would
# be meaningless, and exp overflows at 710.
LOSS_CAP = 20.0


@dataclass(frozen=True)
class LanguageScore:
    """How well a model predicts a text."""

    loss: float
    """mean cross entropy per target token, in nats"""
    tokens: int
    """target tokens"""
    n_bytes: int
    """UTF-8 bytes of the text of the targets"""
    n_right: int
    """targets that are the most probable token"""

    @property
    def accuracy(self) -> float:
        """Share of the targets that are the most probable token."""
        return self.n_right / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the mean loss; a loss above LOSS_CAP counts as LOSS_CAP."""
        return math.exp(min(self.loss, LOSS_CAP))

    @property
    def bits_per_byte(self) -> float:
        """Bits to store one byte of the text; comparable across tokenizers."""
        return self.loss * self.tokens / math.log(2) / self.n_bytes if self.n_bytes else math.nan


def language_score(loss_sum: float, tokens: float, n_bytes: float, n_right: float) -> LanguageScore:
    """The score from sums over all batches: the mean is taken once, weighted by tokens.

    >>> score = language_score(loss_sum=20.0, tokens=10, n_bytes=40, n_right=3)
    >>> round(score.perplexity, 3), round(score.bits_per_byte, 3), score.accuracy
    (7.389, 0.721, 0.3)
    """
    loss = loss_sum / tokens if tokens else math.nan
    return LanguageScore(loss, int(tokens), int(n_bytes), int(n_right))


def batch_sums(
    features: Callable[..., Features],
    head: Head,
    batch: dict[str, Any],
    byte_lengths: Tensor,
) -> Tensor:
    """(loss sum, n targets, bytes of the targets' text, n targets predicted right) of a batch,
    a float tensor (4,).

    Args:
        features: `Decoder.features`, compiled or not.
        head: the output layer; its weight is read after `features`,
            which gathers it if it is sharded.
        batch: `input_ids` and `labels` (B, T), and what `extra_inputs` takes.
        byte_lengths: (V,) UTF-8 bytes of each token.
    """
    labels = batch["labels"].flatten()  # (B·T,)
    hidden = features(batch["input_ids"], **extra_inputs(batch)).hidden  # (B, T, D)
    flat = hidden.flatten(0, 1)  # (B·T, D)
    loss_sum, n_right = score_targets(flat, head.weight, labels, softcap=head.softcap)
    targets = labels[labels != IGNORE_INDEX]
    n_targets = loss_sum.new_tensor(len(targets), dtype=torch.float32)
    n_bytes = byte_lengths[targets].sum()
    return torch.stack((loss_sum.float(), n_targets, n_bytes.float(), n_right.float()))


def byte_length_table(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """(V,) UTF-8 bytes of each token id; 0 for ids that only pad the model's vocabulary."""
    lengths = tokenizer.byte_lengths()
    return torch.tensor(lengths + [0] * (vocab_size - len(lengths)))


def score_batches(
    model: Decoder, batches: Iterable[dict[str, Any]], byte_lengths: Tensor
) -> LanguageScore:
    """The score of `model`, in evaluation mode, over batches, which are moved to its device."""
    device = model.embedding.weight.device
    byte_lengths = byte_lengths.to(device)
    totals = [0.0] * 4
    with torch.no_grad():
        for batch in batches:
            tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
            on_device = {name: value.to(device) for name, value in tensors.items()}
            sums = batch_sums(model.features, model.head, on_device, byte_lengths)
            totals = [total + part for total, part in zip(totals, sums.tolist(), strict=True)]
    return language_score(*totals)
