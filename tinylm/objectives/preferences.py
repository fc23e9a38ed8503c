"""What preference training makes of batches of pairs: the log-probabilities of their answers, and the numbers that tell how it goes.

    batch ─▶ both answers in one forward pass ─▶ log p of each           `score_pairs`       under the policy, and under the reference
    both ─▶ loss of each pair, and the sums of MEASURES                  `compare`
    log p of all pairs under a reference, worked out once and kept       `cached_log_probs`

The losses themselves are in losses.py; how a row becomes a pair is rows.py's business.
"""


# N tokens · D model width · V vocabulary · M tokens of one chunk · B answers · T tokens of one

# B pairs · T positions
from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinylm.common.errors import UserError, printable, reading, writing
from tinylm.common.files import replace_file
from tinylm.config.schema import DpoConfig
from tinylm.model.decoder import Decoder, Features
from tinylm.objectives.cross_entropy import (
    _log_probabilities,
    _product_dtype,
    _softmax_dtype,
    _target_chunks,
)
from tinylm.tokens.packing import IGNORE_INDEX

if TYPE_CHECKING:
    from tinylm.model.hf_model import HFModel

pass


def answer_log_probs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """log p of each answer, (B,) in fp32: the sum of log p(label) over its target tokens.

    A chunk's logits are worked out again in the backward pass, so that here too they are never all held at once.

    Args:
        hidden: (B, T, D) the decoder's features.
        weight: (V, D) the head.
        labels: (B, T) int64 classes; IGNORE_INDEX marks a token that is not a target.
    """
    flat_hidden, flat_labels = hidden.flatten(0, 1), labels.flatten()
    totals = torch.zeros(labels.size(0), dtype=_softmax_dtype(weight), device=hidden.device)
    for tokens in _target_chunks(flat_labels):
        of_label = checkpoint(
            _label_log_probs, flat_hidden[tokens], weight, flat_labels[tokens], use_reentrant=False
        )
        totals = totals.index_add(0, tokens // labels.size(1), of_label)
    return totals


def _label_log_probs(inputs: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log p (M,) of the targets of one chunk."""
    head = weight.to(_product_dtype(weight))
    return _log_probabilities(inputs.to(head.dtype), head).gather(1, targets[:, None]).squeeze(1)


class Answers(NamedTuple):
    """The two answers of each preference, as one model sees them."""

    chosen: Tensor
    """(B,) log p of the better answer"""
    rejected: Tensor
    """(B,) log p of the worse one"""


class Preferences(NamedTuple):
    """What a preference loss gives, (B,) each."""

    loss: Tensor
    chosen_reward: Tensor
    """beta · (log p - log p of the reference), the reward that the policy stands for (Rafailov et al. 2023, equation 5)"""
    rejected_reward: Tensor


def preference_loss(
    policy: Answers, reference: Answers, lengths: Answers, dpo: DpoConfig
) -> Preferences:
    """How far the policy is from preferring each chosen answer, (B,): direct preference optimisation.

    With h = (log p - log p of the reference) of the chosen answer minus that of the rejected one:

        sigmoid  -(1 - e) log s(beta h) - e log s(-beta h)    Rafailov et al. 2023, equation 7; e as in Mitchell 2023, cDPO
        hinge    max(0, 1 - beta h)                           Zhao et al. 2023, SLiC
        ipo      (h - 1 / (2 beta))^2                         Azar et al. 2023, equation 17

    ipo takes both log-probabilities per token of their answer, as its authors do; the others do so with
    dpo.length_normalised, which keeps long answers from weighing more.

    Args:
        policy: log-probabilities under the model that is trained.
        reference: under the model that it must not leave.
        lengths: target tokens of the answers.
        dpo: which loss.
    """
    chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    n_chosen, n_rejected = lengths if dpo.loss == "ipo" or dpo.length_normalised else (1, 1)
    h = chosen / n_chosen - rejected / n_rejected
    if dpo.loss == "ipo":
        loss = (h - 1 / (2 * dpo.beta)).square()
    elif dpo.loss == "hinge":
        loss = F.relu(1 - dpo.beta * h)
    else:
        loss = -(1 - dpo.label_smoothing) * F.logsigmoid(
            dpo.beta * h
        ) - dpo.label_smoothing * F.logsigmoid(-dpo.beta * h)
    return Preferences(loss, dpo.beta * chosen.detach(), dpo.beta * rejected.detach())


# Means over pairs, of which metrics.csv has columns; rewards as in `losses.Preferences`, accuracy: share of the pairs whose chosen reward is higher.
MEASURES = (
    "rewards_chosen",
    "rewards_rejected",
    "margin",
    "accuracy",
    "logp_chosen",
    "logp_rejected",
)
_DIGEST_BYTES = hashlib.sha256().digest_size


class PairScores(NamedTuple):
    """What a model makes of a batch of pairs."""

    log_probs: Answers
    lengths: Answers
    """(B,) target tokens of each answer; 0 in a row of padding"""
    balance_loss: Tensor
    """of a mixture of experts; else 0"""


def score_pairs(
    features: Callable[..., Features], head: nn.Linear, batch: dict[str, Any]
) -> PairScores:
    """The log-probabilities of the answers of `batch`, chosen and rejected in one forward pass.

    Args:
        features: `Decoder.features`, compiled or not.
        head: the layer that scores tokens.
        batch: `chosen_ids`, `chosen_labels`, `rejected_ids`, `rejected_labels` (B, T).
    """
    labels = torch.cat((batch["chosen_labels"], batch["rejected_labels"]))
    found = features(torch.cat((batch["chosen_ids"], batch["rejected_ids"])))
    log_probs = answer_log_probs(found.hidden, head.weight, labels)
    lengths = (labels != IGNORE_INDEX).sum(dim=1)
    return PairScores(Answers(*log_probs.chunk(2)), Answers(*lengths.chunk(2)), found.balance_loss)


class Comparison(NamedTuple):
    """How a policy stands to its reference on the pairs of a batch that are not padding."""

    loss: Tensor
    """(n,)"""
    cross_entropy: Tensor
    """(n,) of the chosen answer, per token"""
    measures: Tensor
    """sums of MEASURES"""


def compare(policy: PairScores, reference: Answers, dpo: DpoConfig) -> Comparison:
    """The preference loss of each pair, and what metrics.csv has beside it."""
    real = policy.lengths.chosen > 0
    own, theirs, lengths = (
        Answers(*(part[real] for part in answers))
        for answers in (policy.log_probs, reference, policy.lengths)
    )
    loss, chosen, rejected = preference_loss(own, theirs, lengths, dpo)
    sums = [
        part.detach().float().sum()
        for part in (chosen, rejected, chosen - rejected, chosen > rejected, *own)
    ]
    return Comparison(loss, -own.chosen / lengths.chosen, torch.stack(sums))


def log_probs_of(
    model: Decoder | HFModel,
    batches: Iterable[dict[str, Any]],
    precision: torch.dtype | None,
) -> np.ndarray:
    """(n, 2) float32: log p of the chosen and of the rejected answer of every pair in `batches`, under `model` in evaluation mode.

    Args:
        precision: what the products are in, under autocast; None: fp32.
    """
    device = model.embedding.weight.device
    found = []
    model.eval()
    with (
        torch.no_grad(),
        torch.autocast(device.type, dtype=precision, enabled=precision is not None),
    ):
        for batch in batches:
            scores = score_pairs(
                model.features,
                model.head,
                {
                    name: value.to(device)
                    for name, value in batch.items()
                    if isinstance(value, Tensor)
                },
            )
            found.append(
                torch.stack(scores.log_probs, dim=1)[scores.lengths.chosen > 0]
                .float()
                .cpu()
                .numpy()
            )
    return np.concatenate(found)


def cached_log_probs(path: Path, n_pairs: int, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """The (n_pairs, 2) array in the file `path`, which `compute` makes where there is none.

    The file is there whole or not at all, whenever the process is killed; a second process that wants it waits for the first.

    Raises:
        UserError: the file is damaged, or cannot be written.
    """
    with writing(path, "data.cache_dir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.exists():
                content = compute().astype("<f4").tobytes()
                replace_file(
                    path, hashlib.sha256(content).digest() + content
                )  # under the lock nobody else uses the name beside
    with reading(path):
        raw = path.read_bytes()
    digest, content = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest or len(content) != n_pairs * 2 * 4:
        raise UserError(
            f"{printable(path)}: its content is not what was written (checksum). Delete it: it is made again."
        )
    return np.frombuffer(content, dtype="<f4").reshape(n_pairs, 2)
