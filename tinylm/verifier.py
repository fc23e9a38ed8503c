"""A verifier: an encoder that reads a problem with an answer and says how likely the answer is right (Cobbe et al. 2021).

    ids of problem and answer ─▶ embedding ─▶ n_layers × [ attention to both sides ─▶ feed-forward ] ─▶ norm ─▶ a score a token ─▶ one logit

Its blocks are the decoder's; only the mask differs, since here every token sees every other. So it can begin with a
decoder's weights. An answer is as right as its least right token: the logit is a soft minimum of the scores, which learned
in fewer steps than a mean over the tokens, where one wrong number is one of two hundred (docs/RESULTS.md). After it: wrong
answers made from right ones, and how a verifier's scores are judged.
"""

# B pairs · T tokens of one · D model width

import math
import random
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.config import ModelConfig
from tinylm.decoder import Block, Decoder, Sight, initialise, make_norm, rope_angles
from tinylm.errors import UserError
from tinylm.metrics import wilson

# A number as people write it: 1,200 or 3.5; the sign belongs to the sum it stands in.
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?", re.ASCII)
CALIBRATION_BINS = 10
# Scores of many pairs are counted in bins of logits so wide, up to this distance from 0, which is a border of bins: sums of counts
# can be added over batches and devices, and within a bin a probability moves by 0.0025 at most.
LOGIT_STEP, LOGIT_LIMIT = 0.02, 20


class Verifier(nn.Module):
    """`model(input_ids, attention_mask)` gives a logit (B,): above 0, the answer is more likely right than wrong."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("the verifier needs model.vocab_size; build it from a config whose vocabulary is known")
        check_shape(config)
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        if config.position == "learned":
            self.positions = nn.Embedding(config.max_seq_len, config.d_model)
        self.dropout = nn.Dropout(config.residual_dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = make_norm(config, config.d_model) if config.norm_placement == "pre" else nn.Identity()
        self.score = nn.Linear(config.d_model, 1)
        initialise(self)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (B,) of ids (B, T), padded on the right where `attention_mask` (B, T) is False."""
        T = input_ids.size(1)
        if self.config.max_seq_len < T:
            raise ValueError(f"{T} positions are more than max_seq_len ({self.config.max_seq_len})")
        positions = torch.arange(T, device=input_ids.device)
        x = self.embedding(input_ids)
        if self.config.position == "learned":
            x = x + self.positions(positions)
        x = self.dropout(x)
        angles = rope_angles(positions, self.config.size_of_head, self.config.rope_theta) if self.config.position == "rope" else None
        seen = F.pad(attention_mask[:, None, None, :].bool(), (self.config.n_sinks, 0), value=True)  # (B, 1, 1, n_sinks + T)
        sight = Sight(positions, angles, seen, is_causal=False, cache=None)
        for block in self.blocks:
            x, _ = block(x, sight)
        scores = self.score(self.norm(x)).squeeze(-1).float()  # (B, T)
        return soft_minimum(scores, attention_mask.bool())

    def begin_with(self, decoder: Decoder) -> None:
        """Take over a decoder's weights; only the score has nothing to begin with."""
        theirs = decoder.state_dict()
        self.load_state_dict({name: theirs.get(name, own) for name, own in self.state_dict().items()}, strict=True)


def soft_minimum(scores: Tensor, real: Tensor) -> Tensor:
    """-log of the mean of exp(-score) over the real tokens, (B,) from (B, T): near the least score where that is far below the others.

    exp(-score) is the odds of a token being wrong, and the odds of the answer are their mean, up to a constant of the number of tokens.

    >>> soft_minimum(torch.tensor([[2.0, 2.0, 9.0]]), torch.tensor([[True, True, False]])).item()
    2.0
    """
    return real.sum(dim=1).log() - (-scores).masked_fill(~real, -math.inf).logsumexp(dim=1)


def check_shape(config: ModelConfig) -> None:
    """UserError for settings that only a decoder can have."""
    for name, value, reason in (
        ("position", config.position == "alibi", "alibi looks back only; use rope, learned or none"),
        ("sliding_window", config.sliding_window is not None, "a verifier reads everything; take it out"),
        ("moe", config.moe is not None, "a verifier has no experts; take it out"),
    ):
        if value:
            raise UserError(f"model.{name}: {reason} for the verifier.")


def verifier_loss(logits: Tensor, right: Tensor) -> Tensor:
    """The sum of the cross entropies of right (1) and wrong (0) under the logits; both (B,)."""
    return F.binary_cross_entropy_with_logits(logits, right.to(logits.dtype), reduction="sum")


# --- wrong answers ----------------------------------------------------------------------------------------------------


def corrupted(answer: str, draw: random.Random) -> str | None:
    """The answer with one of its numbers changed at one place; None where it has no number.

    >>> corrupted("48 / 2 = 24", random.Random(0))
    '48 / 5 = 24'
    """
    places = list(NUMBER.finditer(answer))
    if not places:
        return None
    place = draw.choice(places)
    return answer[: place.start()] + _another_number(place[0], draw) + answer[place.end() :]


def _another_number(text: str, draw: random.Random) -> str:
    """A number near the one in `text`, written as it is: same decimals, commas where it had some."""
    decimals = len(text.partition(".")[2])
    value = float(text.replace(",", ""))
    step = 10.0**-decimals
    spread = max(3, int(abs(value) / step / 5))
    while True:
        other = value + step * draw.randint(-spread, spread)
        shown = f"{other:,.{decimals}f}" if "," in text else f"{other:.{decimals}f}"
        if other >= 0 and shown != text:
            return shown


# --- how good its scores are ------------------------------------------------------------------------------------------


def logit_counts(logits: Tensor, right: Tensor) -> Tensor:
    """How many wrong and how many right pairs have a logit in each bin, flat (2 · bins,); a logit beyond the limit is in the last bin."""
    n_bins = round(2 * LOGIT_LIMIT / LOGIT_STEP)
    bins = ((logits / LOGIT_STEP).floor() + n_bins // 2).clamp(0, n_bins - 1).long()
    return torch.bincount(bins + n_bins * right.long(), minlength=2 * n_bins).float()


@dataclass(frozen=True)
class VerifierScore:
    """How a verifier does on held-out pairs."""

    n: int
    accuracy: float
    """share of pairs on the right side of one half"""
    majority: float
    """accuracy of always saying what is more frequent"""
    auc: float
    """probability that a right answer has a higher score than a wrong one; one half is chance"""
    calibration_error: float
    """mean distance between probability and share of right answers, over ten bins (Guo et al. 2017)"""

    @classmethod
    def of(cls, probabilities: np.ndarray, right: np.ndarray) -> "VerifierScore":
        """From the probabilities (N,) of being right and whether they were (N,) bool."""
        right = right.astype(bool)
        accuracy, majority = float(((probabilities >= 0.5) == right).mean()), float(max(right.mean(), 1 - right.mean()))
        return cls(len(right), accuracy, majority, area_under_curve(probabilities, right), calibration_error(probabilities, right))

    @classmethod
    def of_counts(cls, counts: np.ndarray) -> "VerifierScore":
        """From a sum of `logit_counts`: each pair counts as one in the middle of its bin."""
        counts = counts.reshape(2, -1).astype(int)
        middles = (np.arange(counts.shape[1]) + 0.5) * LOGIT_STEP - LOGIT_LIMIT
        probabilities = 1 / (1 + np.exp(-middles))
        return cls.of(np.concatenate([np.repeat(probabilities, row) for row in counts]), np.repeat([False, True], counts.sum(axis=1)))

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the accuracy."""
        return wilson(self.accuracy, self.n)


def area_under_curve(scores: np.ndarray, right: np.ndarray) -> float:
    """The share of (right, wrong) pairs in which the right one has the higher score, ties counted half; NaN without both.

    >>> area_under_curve(np.array([0.9, 0.4, 0.4, 0.1]), np.array([True, True, False, False]))
    0.875
    """
    n_right, n_wrong = int(right.sum()), int((~right).sum())
    if not n_right or not n_wrong:
        return float("nan")
    values, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # equal scores share the mean of their ranks
    return float((ranks[right].sum() - n_right * (n_right + 1) / 2) / (n_right * n_wrong))


def calibration_error(probabilities: np.ndarray, right: np.ndarray) -> float:
    """The mean over all pairs of |probability - share of right answers| of their bin; 0 is perfect."""
    bins = np.minimum((probabilities * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    total = sum(abs(probabilities[bins == b].sum() - right[bins == b].sum()) for b in range(CALIBRATION_BINS))
    return float(total / len(right))
