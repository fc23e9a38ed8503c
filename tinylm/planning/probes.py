"""Steps of training that only show something, with a model that is thrown away afterwards.

    Trial           a model and its optimizer that take steps as training does
    overfit         one batch again and again: a model that can learn learns it by heart
    lr_range_test   the learning rate rises at each step, until the loss does too; `suggested_lr` reads the curve
    measure_speed   tokens a second of this machine; `matrix_rate` is what a bare matrix product reaches on it

Everything on one device, without Lightning and without torch.compile. Knows nothing of files: batches are handed in.
"""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinylm.common.device import autocast_dtype
from tinylm.common.errors import Diverged
from tinylm.config.schema import Config
from tinylm.model.decoder import Decoder, Features
from tinylm.objectives.cross_entropy import cross_entropy
from tinylm.optim.optimizers import make_optimizer, set_lr
from tinylm.tokens.packing import IGNORE_INDEX

Batch = dict[str, Any]
"""`input_ids` and `labels` (B, T), maybe `document_ids` (B, T), as data.py makes them"""


def autocast(config: Config, device: str) -> Any:
    """The arithmetic that hardware.precision asks for, as a context."""
    dtype = autocast_dtype(config.hardware.precision)
    return nullcontext() if dtype is None else torch.autocast(device, dtype=dtype)


def batch_loss(model: Decoder, features: Features, labels: Tensor, config: Config) -> Tensor:
    """What pretraining minimises, a mean over the targets: cross entropy, and the balance loss of a mixture of experts."""
    flat = labels.flatten()
    loss = cross_entropy(
        features.hidden.flatten(0, 1),
        model.head.weight,
        flat,
        label_smoothing=config.training.label_smoothing,
    )
    moe = config.model.moe
    balance = 0.0 if moe is None else moe.balance_coef
    return loss / (flat != IGNORE_INDEX).sum().clamp(min=1) + balance * features.balance_loss


class Trial:
    """`model` and a new optimizer on `device`: one micro-batch, and one optimizer step, at a time."""

    def __init__(self, model: Decoder, config: Config, device: str):
        self.config, self.device = config, device
        self.model = model.to(device).train()
        half = config.hardware.precision == "16"
        self.optimizer = make_optimizer(self.model, config.training, fused=not half)
        self.scaler = torch.amp.GradScaler(device, enabled=half)

    def micro_batch(self, batch: Batch, parts: int = 1) -> float:
        """Add the gradient of one of `parts` micro-batches of a step; its loss comes back."""
        on_device = {
            name: value.to(self.device)
            for name, value in batch.items()
            if isinstance(value, Tensor)
        }
        with autocast(self.config, self.device):
            features = self.model.features(
                on_device["input_ids"], document_ids=on_device.get("document_ids")
            )
            loss = batch_loss(self.model, features, on_device["labels"], self.config)
        self.scaler.scale(loss / parts).backward()
        return loss.item()  # waits for the device

    def take_step(self, share: float = 1.0) -> None:
        """Move the weights by the gradient so far, clipped, at `share` of the configured learning rate."""
        set_lr(self.optimizer, share)
        self.scaler.unscale_(self.optimizer)
        limit = self.config.training.grad_clip
        torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), math.inf if limit is None else limit
        )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def step(self, batches: Sequence[Batch], share: float = 1.0) -> float:
        """One optimizer step on these micro-batches; the mean of their losses comes back."""
        losses = [self.micro_batch(batch, len(batches)) for batch in batches]
        self.take_step(share)
        return sum(losses) / len(losses)


# --- can it learn -----------------------------------------------------------------------------------------------------

# Of the first loss; below it a batch counts as learnt. What remains is the beginnings of rows, which nothing tells apart.
LEARNT = 0.1
WARM_UP = 10


def without_noise(config: Config) -> Config:
    """The settings without what keeps a loss from zero: dropout and label smoothing."""
    model = config.model.model_copy(update={"attention_dropout": 0.0, "residual_dropout": 0.0})
    return config.model_copy(
        update={
            "model": model,
            "training": config.training.model_copy(update={"label_smoothing": 0.0}),
        }
    )


def overfit(trial: Trial, batch: Batch, steps: int) -> Iterator[float]:
    """The loss of each step on the same batch, at most `steps`, until it is below LEARNT of the first.

    Raises:
        Diverged: it is not a finite number any more.
    """
    first = math.inf
    for n in range(steps):
        loss = trial.step([batch], min(1.0, (n + 1) / WARM_UP))
        if not math.isfinite(loss):
            raise Diverged(f"step {n + 1}: the loss is {loss}. Lower training.lr")
        first = loss if n == 0 else first
        yield loss
        if loss < LEARNT * first:
            return


# --- the learning rate ------------------------------------------------------------------------------------------------

LOWEST_LR, HIGHEST_LR = 1e-5, 10.0
RANGE_STEPS = 120
# Steps whose losses are meant together, a quarter of a power of ten.
SMOOTHED = 5
# Of the fall of the smoothed loss, what may be missing.
ENOUGH = 0.05
# The test ends where the smoothed loss is so many times its lowest.
TOO_HIGH = 2.0


def range_lr(n: int, steps: int) -> float:
    """The learning rate of step `n` of `steps`: from LOWEST_LR to HIGHEST_LR, times the same factor at each step."""
    return LOWEST_LR * (HIGHEST_LR / LOWEST_LR) ** (n / (steps - 1))


def lr_range_test(
    trial: Trial, batches: Iterable[Batch], steps: int = RANGE_STEPS
) -> Iterator[tuple[float, float]]:
    """(training.lr, loss) of each step of a test that ends when the loss has risen (Smith 2017, section 3.3).

    Other learning rates, such as training.muon_lr, keep their ratio to training.lr.
    """
    parts, source = trial.config.training.grad_accum_steps, iter(batches)
    losses: list[float] = []
    for n in range(steps):
        lr = range_lr(n, steps)
        loss = trial.step([next(source) for _ in range(parts)], lr / trial.config.training.lr)
        if not math.isfinite(loss):
            return
        losses.append(loss)
        yield lr, loss
        smoothed = smoothed_losses(losses)
        if smoothed[-1] > TOO_HIGH * min(smoothed):
            return


def smoothed_losses(losses: Sequence[float]) -> list[float]:
    """The mean of each loss and the SMOOTHED - 1 before it.

    >>> smoothed_losses([6.0, 4.0, 2.0])
    [6.0, 5.0, 4.0]
    """
    windows = [losses[max(0, n + 1 - SMOOTHED) : n + 1] for n in range(len(losses))]
    return [sum(window) / len(window) for window in windows]


def suggested_lr(curve: Sequence[tuple[float, float]]) -> float:
    """A third of the lowest rate that takes the smoothed loss down, but for a twentieth, as far as any does.

    Where the loss is lowest it would be too high for a long run: just beyond, it rises.

    >>> round(suggested_lr([(0.001, 5.0), (0.03, 3.0), (0.3, 3.0), (3.0, 9.0)]), 3)  # means of up to five: 5, 4, 3.67, 5
    0.1
    """
    smoothed = smoothed_losses([loss for _, loss in curve])
    enough = min(smoothed) + ENOUGH * (smoothed[0] - min(smoothed))
    return next(lr for (lr, _), loss in zip(curve, smoothed, strict=True) if loss <= enough) / 3


# --- this machine's speed ---------------------------------------------------------------------------------------------

MEASURED_SECONDS = 1.0
# A micro-batch that would take longer is measured with fewer rows.
LONGEST_SECONDS = 20.0


@dataclass(frozen=True)
class Speed:
    """What one device does."""

    tokens_per_second: float
    """target tokens, the optimizer's steps counted in"""
    rows: int
    """of the micro-batches that were measured"""


def measure_speed(model: Decoder, config: Config, device: str) -> Speed:
    """Real micro-batches of random tokens for about a second, and an optimizer step."""
    training = config.training
    trial = Trial(model, config, device)
    one_row = random_batch(config, 1)
    _timed(lambda: trial.micro_batch(one_row))
    seconds, rows = _timed(lambda: trial.micro_batch(one_row)), 1
    if training.micro_batch_size > 1 and 2 * seconds < LONGEST_SECONDS:
        rows = min(training.micro_batch_size, int(LONGEST_SECONDS / seconds))
        batch = random_batch(config, rows)
        warm = _timed(lambda: trial.micro_batch(batch))
        times = [
            _timed(lambda: trial.micro_batch(batch))
            for _ in range(max(1, min(100, int(MEASURED_SECONDS / warm))))
        ]
        seconds = sum(times) / len(times)
    _timed(trial.take_step)  # makes the optimizer's state
    trial.micro_batch(one_row)
    of_step = training.grad_accum_steps * seconds * training.micro_batch_size / rows + _timed(
        trial.take_step
    )
    return Speed(
        training.grad_accum_steps * training.micro_batch_size * training.seq_len / of_step, rows
    )


def random_batch(config: Config, rows: int) -> Batch:
    """Rows of random tokens, each a target."""
    assert config.model.vocab_size is not None
    ids = torch.randint(config.model.vocab_size, (rows, config.training.seq_len + 1))
    documents = {"document_ids": torch.zeros_like(ids[:, 1:])} if config.data.document_mask else {}
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], **documents}


def _timed(work: Any) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def matrix_rate(config: Config, device: str, *, side: int = 1024, rounds: int = 8) -> float:
    """Floating-point operations a second of the best of some square matrix products in the run's arithmetic."""
    matrix = torch.randn(
        side, side, device=device, dtype=autocast_dtype(config.hardware.precision) or torch.float32
    )
    return 2 * side**3 / min(_timed(lambda: matrix @ matrix) for _ in range(rounds))
