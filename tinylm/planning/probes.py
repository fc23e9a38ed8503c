"""Short experiments before a run, with a model that is discarded afterwards.

    Probe          a model and an optimizer that take steps as training does
    overfit        one batch again and again: a model that can learn at all drives its loss to nearly zero
    lr_range_test  the learning rate rises at each step until the loss does too; `suggest_lr` reads
    the curve measure_speed  tokens per second on this machine; `measure_matmul_flops` is the speed
    of a bare matrix product

All on one device, without Lightning and without torch.compile. Knows nothing of files: batches are
arguments.
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
"""`input_ids` and `labels` (B, T), and `document_ids` (B, T) with data.document_mask,
as data.py makes them"""


def autocast(config: Config, device: str) -> Any:
    """The context for the arithmetic of hardware.precision."""
    dtype = autocast_dtype(config.hardware.precision)
    return nullcontext() if dtype is None else torch.autocast(device, dtype=dtype)


def batch_loss(model: Decoder, features: Features, labels: Tensor, config: Config) -> Tensor:
    """The pretraining loss: the mean cross entropy over the targets,
    and the balance loss of a mixture of experts.
    """
    flat = labels.flatten()
    loss = cross_entropy(
        features.hidden.flatten(0, 1),
        model.head.weight,
        flat,
        label_smoothing=config.training.label_smoothing,
        softcap=model.head.softcap,
    )
    moe = config.model.moe
    balance = 0.0 if moe is None else moe.balance_coef
    return loss / (flat != IGNORE_INDEX).sum().clamp(min=1) + balance * features.balance_loss


class Probe:
    """`model` with a new optimizer on `device`; takes micro-batches and optimizer steps one
    at a time.
    """

    def __init__(self, model: Decoder, config: Config, device: str):
        self.config = config
        self.device = device
        self.model = model.to(device).train()
        half = config.hardware.precision == "16"
        self.optimizer = make_optimizer(self.model, config.training, fused=not half)
        self.scaler = torch.amp.GradScaler(device, enabled=half)

    def micro_batch(self, batch: Batch, parts: int = 1) -> float:
        """Add the gradient of one of the `parts` micro-batches of a step, and return its loss."""
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
        """Update the weights by the accumulated gradient, clipped,
        at `share` of the configured learning rate.
        """
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
        """Take one optimizer step on these micro-batches, and return the mean of their losses."""
        losses = [self.micro_batch(batch, len(batches)) for batch in batches]
        self.take_step(share)
        return sum(losses) / len(losses)


# --- can the model learn ---

# A batch is learned when its loss is below this share of the first. The first tokens of rows cannot
# be predicted.
LEARNED = 0.1
WARMUP_STEPS = 10


def without_noise(config: Config) -> Config:
    """The settings without dropout and label smoothing, which keep the loss above zero."""
    model = config.model.model_copy(update={"attention_dropout": 0.0, "residual_dropout": 0.0})
    return config.model_copy(
        update={
            "model": model,
            "training": config.training.model_copy(update={"label_smoothing": 0.0}),
        }
    )


def overfit(probe: Probe, batch: Batch, steps: int) -> Iterator[float]:
    """The loss of each of at most `steps` steps on the same batch,
    until it is below `LEARNED` times the first.

    Raises:
        Diverged: the loss is not a finite number.
    """
    first = math.inf
    for n in range(steps):
        loss = probe.step([batch], min(1.0, (n + 1) / WARMUP_STEPS))
        if not math.isfinite(loss):
            raise Diverged(f"step {n + 1}: the loss is {loss}. Lower training.lr")
        first = loss if n == 0 else first
        yield loss
        if loss < LEARNED * first:
            return


# --- the learning rate ---

LOWEST_LR, HIGHEST_LR = 1e-5, 10.0
RANGE_STEPS = 120
# Losses are averaged over this many steps: a quarter of a power of ten of the learning rate.
SMOOTHING_STEPS = 5
# The suggested rate reaches all but this share of the largest fall of the smoothed loss.
TOLERANCE = 0.05
# The test ends when the smoothed loss is this many times its minimum.
MAX_RISE = 2.0


def range_lr(n: int, steps: int) -> float:
    """The learning rate of step `n` of `steps`: from LOWEST_LR to HIGHEST_LR,
    multiplied by a constant at each step.
    """
    return LOWEST_LR * (HIGHEST_LR / LOWEST_LR) ** (n / (steps - 1))


def lr_range_test(
    probe: Probe, batches: Iterable[Batch], steps: int = RANGE_STEPS
) -> Iterator[tuple[float, float]]:
    """(training.lr, loss) of each step of a test that ends when the loss rises
    (Smith 2017, section 3.3).

    Other learning rates, such as training.muon_lr, keep their ratio to training.lr.
    """
    n_parts = probe.config.training.grad_accum_steps
    source = iter(batches)
    losses: list[float] = []
    for n in range(steps):
        lr = range_lr(n, steps)
        parts = [next(source) for _ in range(n_parts)]
        loss = probe.step(parts, lr / probe.config.training.lr)
        if not math.isfinite(loss):
            return
        losses.append(loss)
        yield lr, loss
        smoothed = smoothed_losses(losses)
        if smoothed[-1] > MAX_RISE * min(smoothed):
            return


def smoothed_losses(losses: Sequence[float]) -> list[float]:
    """The mean of each loss and the `SMOOTHING_STEPS` - 1 before it.

    >>> smoothed_losses([6.0, 4.0, 2.0])
    [6.0, 5.0, 4.0]
    """
    windows = [losses[max(0, n + 1 - SMOOTHING_STEPS) : n + 1] for n in range(len(losses))]
    return [sum(window) / len(window) for window in windows]


def suggest_lr(curve: Sequence[tuple[float, float]]) -> float:
    """A third of the lowest rate at which the smoothed loss falls 95% as far as at any rate.

    The rate of the lowest loss would be too high for a long run: beyond it the loss rises.

    >>> round(suggest_lr([(0.001, 5.0), (0.03, 3.0), (0.3, 3.0), (3.0, 9.0)]), 3)  # means of up to five: 5, 4, 3.67, 5
    0.1
    """
    smoothed = smoothed_losses([loss for _, loss in curve])
    enough = min(smoothed) + TOLERANCE * (smoothed[0] - min(smoothed))
    return next(lr for (lr, _), loss in zip(curve, smoothed, strict=True) if loss <= enough) / 3


# --- the speed of this machine ---

MEASURED_SECONDS = 1.0
# A micro-batch that would take longer is measured with fewer rows.
MAX_SECONDS = 20.0


@dataclass(frozen=True)
class Speed:
    """The speed of one device."""

    tokens_per_second: float
    """target tokens, with the time of optimizer steps included"""
    rows: int
    """of the measured micro-batches"""


def measure_speed(model: Decoder, config: Config, device: str) -> Speed:
    """Time micro-batches of random tokens for about a second, and an optimizer step."""
    training = config.training
    probe = Probe(model, config, device)
    # One row, the second time without the costs of a first step.
    one_row = random_batch(config, 1)
    _timed(lambda: probe.micro_batch(one_row))
    seconds = _timed(lambda: probe.micro_batch(one_row))
    rows = 1
    # The whole micro-batch, or as many rows as take MAX_SECONDS.
    if training.micro_batch_size > 1 and 2 * seconds < MAX_SECONDS:
        rows = min(training.micro_batch_size, int(MAX_SECONDS / seconds))
        batch = random_batch(config, rows)
        first = _timed(lambda: probe.micro_batch(batch))
        n_rounds = max(1, min(100, int(MEASURED_SECONDS / first)))
        times = [_timed(lambda: probe.micro_batch(batch)) for _ in range(n_rounds)]
        seconds = sum(times) / n_rounds
    # The optimizer; its first step creates its state.
    _timed(probe.take_step)
    probe.micro_batch(one_row)
    optimizer_seconds = _timed(probe.take_step)
    rows_per_step = training.grad_accum_steps * training.micro_batch_size
    step_seconds = rows_per_step * seconds / rows + optimizer_seconds
    return Speed(rows_per_step * training.seq_len / step_seconds, rows)


def random_batch(config: Config, rows: int) -> Batch:
    """Rows of random tokens, all of them targets."""
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


def measure_matmul_flops(
    config: Config, device: str, *, side: int = 1024, rounds: int = 8
) -> float:
    """FLOPs per second of the fastest of `rounds` square matrix products
    in the run's arithmetic.
    """
    dtype = autocast_dtype(config.hardware.precision) or torch.float32
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / min(_timed(lambda: matrix @ matrix) for _ in range(rounds))
