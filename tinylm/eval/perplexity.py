import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinylm.model.decoder import Decoder, Features
from tinylm.objectives.cross_entropy import score_targets
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.packing import IGNORE_INDEX


@dataclass(frozen=True)
class LanguageScore:
    """How well a model predicts a text."""

    loss: float
    """mean cross entropy of a target token, in nats"""
    tokens: int
    """target tokens"""
    n_bytes: int
    """UTF-8 bytes of the text of the targets"""
    n_right: int
    """targets that the model finds more probable than any other token"""

    @property
    def accuracy(self) -> float:
        """Share of the targets that are the most probable token."""
        return self.n_right / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the mean loss, of a loss of at most LOSS_CAP."""
        return math.exp(min(self.loss, LOSS_CAP))

    @property
    def bits_per_byte(self) -> float:
        """Bits to store one byte of the text; runs with different tokenizers compare by it."""
        return self.loss * self.tokens / math.log(2) / self.n_bytes if self.n_bytes else math.nan


def batch_sums(
    features: Callable[..., Features], head: nn.Linear, batch: dict[str, Any], byte_lengths: Tensor
) -> Tensor:
    """(loss sum, targets, bytes of the targets' text, targets predicted right) of one batch of rows, as a float tensor (4,).

    Args:
        features: `Decoder.features`, compiled or not.
        head: the layer that scores tokens; its weight is looked at after `features`, which gathers it where it is sharded.
        byte_lengths: (V,) UTF-8 bytes that each token stands for.
    """
    labels = batch["labels"].flatten()
    hidden = features(batch["input_ids"], **extra_inputs(batch)).hidden
    loss, n_right = score_targets(hidden.flatten(0, 1), head.weight, labels)
    targets = labels[labels != IGNORE_INDEX]
    return torch.stack(
        (
            loss.float(),
            loss.new_tensor(len(targets), dtype=torch.float32),
            byte_lengths[targets].sum().float(),
            n_right.float(),
        )
    )


def extra_inputs(batch: dict[str, Any]) -> dict[str, Tensor]:
    """What `features` is given of a batch beside its ids: to which document each belongs, or what an encoder reads."""
    return {name: batch[name] for name in ("document_ids", "prompt_ids") if name in batch}


def byte_length_table(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """(V,) UTF-8 bytes of each token id; ids that only pad the model's vocabulary stand for no text."""
    lengths = tokenizer.byte_lengths()
    return torch.tensor(lengths + [0] * (vocab_size - len(lengths)))


def score_batches(
    model: Decoder, batches: Iterable[dict[str, Any]], byte_lengths: Tensor
) -> LanguageScore:
    """The score of `model`, in evaluation mode, over batches that are moved to its device."""
    device = model.embedding.weight.device
    lengths = byte_lengths.to(device)
    totals = [0.0] * 4
    with torch.no_grad():
        for batch in batches:
            moved = {
                name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)
            }
            sums = batch_sums(model.features, model.head, moved, lengths)
            totals = [total + part for total, part in zip(totals, sums.tolist(), strict=True)]
    return language_score(*totals)


def language_score(loss_sum: float, tokens: float, n_bytes: float, n_right: float) -> LanguageScore:
    """The score from sums over all batches: means are taken once, at the end, weighted by tokens.

    >>> score = language_score(loss_sum=20.0, tokens=10, n_bytes=40, n_right=3)
    >>> round(score.perplexity, 3), round(score.bits_per_byte, 3), score.accuracy
    (7.389, 0.721, 0.3)
    """
    return LanguageScore(
        loss_sum / tokens if tokens else math.nan, int(tokens), int(n_bytes), int(n_right)
    )


# exp(20) is 4.9e8, far beyond a uniform guess over any vocabulary; above it a perplexity says nothing, and exp overflows at 710.
LOSS_CAP = 20.0
