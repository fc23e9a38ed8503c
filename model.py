"""The LightningModules: what one optimizer step does,
from the loss of a micro-batch to the updated weights.

    TrainingModule     the step itself (`optimizer_step`), shared by all stages
    LanguageModule     the loss of stages pretrain and sft: the next token
    DPOModule, GRPOModule, ...    the losses of the other stages: training/stages/

A stage defines the loss of a micro-batch and what it is a mean over: tokens, pairs or answers, here
called targets. A resumed run needs `progress`, the optimizer's state and the weights, nothing else:
dropout is seeded again for every micro-batch, and the learning rate is a function of the step.

The model is tinylm/model/decoder.py; what happens between two steps is training/callbacks.py.
"""

import logging
import math
import time
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tinylm.common.console import short
from tinylm.common.errors import Diverged
from tinylm.config.schema import Config
from tinylm.eval.perplexity import batch_sums, language_score
from tinylm.model.decoder import Decoder, count_parameters, extra_inputs, flops_per_token
from tinylm.objectives.cross_entropy import cross_entropy
from tinylm.optim.optimizers import make_optimizer, set_lr
from tinylm.optim.schedule import multiplier
from tinylm.tokens.packing import IGNORE_INDEX, Batch

if TYPE_CHECKING:
    from tinylm.model.hf_model import HFModel
    from tinylm.model.verifier import Verifier

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run is: plain numbers, stored in each checkpoint."""

    step: int = 0
    """optimizer steps done"""
    tokens: int = 0
    """target tokens trained on"""
    loss_sum: float = 0.0
    """sum of the losses of the targets since the last row of metrics"""
    n_targets: int = 0
    """the number of those targets"""
    metric_sums: list[float] = field(default_factory=list)
    """sums of the stage's other metrics over those targets"""
    train_loss: float | None = None
    """mean loss in the last row of metrics"""
    train_metrics: list[float] = field(default_factory=list)
    """means of the stage's other metrics in that row"""
    lr: float = 0.0
    """learning rate of the last step"""
    grad_norm: float = 0.0
    """norm of the last step's gradient, before clipping"""
    validations: list[list[float]] = field(default_factory=list)
    """[step, val_loss] of every validation"""
    measured: dict[str, list[list[float]]] = field(default_factory=dict)
    """of training.best_by, if not val_loss: [step, value] each time; negative if more is better"""
    skipped_steps: int = 0
    """steps that training.skip_spikes skipped"""
    skipped_in_a_row: int = 0
    """of these, the last ones without a step between them"""
    recent: list[list[float]] = field(default_factory=list)
    """with training.skip_spikes, [loss, grad_norm] of the last steps that were not skipped"""

    @property
    def val_losses(self) -> list[float]:
        """Every validation loss, oldest first."""
        return [loss for _, loss in self.validations]

    @property
    def best_val_loss(self) -> float:
        """The lowest finite validation loss; NaN if there is none."""
        return min((loss for loss in self.val_losses if math.isfinite(loss)), default=math.nan)

    @property
    def best_step(self) -> int | None:
        """The last step with `best_val_loss`, which is best.ckpt; None if there is none."""
        steps = [int(step) for step, loss in self.validations if loss == self.best_val_loss]
        return max(steps, default=None)

    def validated(self, step: int) -> bool:
        """Whether the validation of `step` is done."""
        return any(int(done) == step for done, _ in self.validations)

    def finish_metrics_row(self) -> None:
        """Compute the means for a row of metrics, and start the sums of the next row;
        there are no means if every step since the last row was skipped.
        """
        self.train_loss, self.train_metrics = None, []
        if self.n_targets:
            self.train_loss = self.loss_sum / self.n_targets
            self.train_metrics = [total / self.n_targets for total in self.metric_sums]
            self.loss_sum, self.n_targets, self.metric_sums = 0.0, 0, []

    def to_plain(self) -> dict[str, Any]:
        """Plain types for a checkpoint; `Progress(**plain)` is the inverse."""
        return asdict(self)


class BatchLoss(NamedTuple):
    """The loss of one micro-batch, as sums over its targets."""

    loss: Tensor
    """sum of the losses, a scalar"""
    n_targets: Tensor
    """the number of targets: tokens, pairs or answers"""
    n_tokens: Tensor
    """the number of tokens trained on"""
    regularizer: Tensor
    """minimized in addition to the loss, per target"""
    metrics: Tensor | None = None
    """sums over the targets, one for each of the stage's `train_columns`"""


class TrainingModule(L.LightningModule):
    """One optimizer step of any stage; a stage adds its loss and its validation."""

    references: dict[str, Any]
    """what rebuilding the model needs besides settings and weights (checkpoint/format.py)"""
    normalizer: int
    """the number of targets of a micro-batch without padding"""
    train_columns: tuple[str, ...] = ()
    """columns of metrics.csv that only this stage has, about training rows"""
    val_columns: tuple[str, ...] = ()
    """columns of metrics.csv that only this stage has, about validations"""

    def __init__(
        self,
        config: Config,
        decoder: "Decoder | HFModel | Verifier",
        stage: str,
        references: dict[str, Any],
    ):
        super().__init__()
        self.config, self.decoder = config, decoder
        self.stage, self.references = stage, references
        self.balance_coef = 0.0 if config.model.moe is None else config.model.moe.balance_coef
        self.progress = Progress()
        self.cursor: list[int] | None = None
        self.system: str | None = None
        """the system turn that its answers are generated with"""
        self.rows_per_pass: float | None = None
        """rows of one pass over the training data; None if that is not known"""
        self.validation_sample: str | None = None
        """a text that the last validation generated, to be shown"""
        self.waits_since: float | None = None  # the end of the last micro-batch; None in one
        self.data_wait = 0.0  # seconds of waiting for micro-batches since the last row of metrics
        self._losses: list[BatchLoss] = []  # of the micro-batches of this step
        self._origins: list[Any] = []  # of their rows

    # --- defined by a stage ---

    def batch_loss(self, batch: Batch, *, label_smoothing: float) -> BatchLoss:
        """The loss of a micro-batch."""
        raise NotImplementedError

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sums over one batch, in eval mode and without label smoothing;
        `val_metrics` takes their totals.
        """
        raise NotImplementedError

    def val_metrics(self, totals: list[float]) -> dict[str, float]:
        """val_loss and `val_columns`, from the sums over all batches and ranks."""
        raise NotImplementedError

    def stage_state(self) -> dict[str, Any]:
        """What only this stage adds to a checkpoint, and needs to resume."""
        return {}

    def passes_at(self, step: int, world_size: int) -> float | None:
        """How often the run has seen the training data after `step`; None if that is not known."""
        if self.rows_per_pass is None:
            return None
        training = self.config.training
        rows_per_step = training.micro_batch_size * training.grad_accum_steps * world_size
        return step * rows_per_step / self.rows_per_pass

    # --- before the first step ---

    def describe(self) -> str:
        """One line: parameters, trained parameters or FLOPs per token, tokens per step, steps,
        passes over the data.
        """
        config, model = self.config, self.decoder
        training, hardware = config.training, config.hardware
        world_size = hardware.devices * hardware.num_nodes
        n_rows = training.micro_batch_size * training.grad_accum_steps * world_size
        per_step = f"{n_rows * training.seq_len:,} tokens"
        if config.dpo is not None or config.reward_model is not None:
            per_step = f"{n_rows:,} pairs"
        elif config.verifier is not None:
            per_step = f"{n_rows:,} problems"
        elif config.grpo is not None:
            per_step = f"{n_rows:,} answers to {n_rows // config.grpo.group_size:,} prompts"
        passes = self.passes_at(training.max_steps, world_size)
        work = ""
        if config.lora is not None:
            n_trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
            work = f"{n_trained:,} of them trained, "
        elif isinstance(model, Decoder):
            work = f"{short(flops_per_token(model, training.seq_len))} FLOPs per token, "
        line = f"model: {count_parameters(model):,} parameters, {work}{per_step} per step, "
        line += f"{training.max_steps:,} steps"
        return line if passes is None else f"{line} ({passes:.3g} passes over the data)"

    def configure_model(self) -> None:
        """Lightning's hook after devices and processes are set up: shard the decoder,
        then compile it.
        """
        if self.config.hardware.strategy == "fsdp" and self.device_mesh is not None:
            # Each block, and the rest, is cut into equal parts, one per device (Zhao et al. 2023).
            mesh = self.device_mesh["data_parallel"]
            assert isinstance(self.decoder, Decoder), "the table of unsupported pairs sees to it"
            for block in self.decoder.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.decoder, mesh=mesh)
            register_fsdp_forward_method(self.decoder, "features")
        self._features = self.decoder.features
        if self.config.hardware.compile:
            self._features = torch.compile(self.decoder.features)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The configured optimizer; every step sets its learning rate,
        so no scheduler has to be restored.
        """
        # Fused AdamW unscales fp16 gradients inside its step, after clipping:
        # clipping would have no effect.
        fused = self.config.hardware.precision != "16"
        return make_optimizer(self.decoder, self.config.training, fused=fused)

    # --- one optimizer step ---
    #
    # Lightning calls optimizer_step BEFORE the forward pass of the last micro-batch, which it hands
    # over as a closure. With training.grad_accum_steps = 3:
    #
    #     training_step(k),     backward
    #     training_step(k + 1), backward
    #     optimizer_step ─▶ 1. closure: training_step(k + 2), backward
    #                       2.-8. rescale, check, clip, set the rate, step, count

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one micro-batch, for Lightning's backward pass.

        Its gradient is divided by the constant `normalizer`: the number of targets of the whole
        step is only known at the step's end, where `optimizer_step` rescales the gradient.
        """
        if self.waits_since is not None:
            self.data_wait += time.monotonic() - self.waits_since
            self.waits_since = None
        # Dropout is a function of (seed, micro-batch, rank), so that a resumed run draws the same
        # masks. The factors keep different triples apart, modulo the 64 bits of a seed.
        training = self.config.training
        k = self.progress.step * training.grad_accum_steps + len(self._losses)
        seed = (training.seed * 1_000_003 + k * 8_191 + self.global_rank + 1) % 2**63
        # torch.manual_seed also writes down its callers, for GPUs: half a millisecond
        (torch.default_generator if self.device.type == "cpu" else torch).manual_seed(seed)

        found = self.batch_loss(batch, label_smoothing=training.label_smoothing)
        self._losses.append(
            found._replace(loss=found.loss.detach(), regularizer=found.regularizer.detach())
        )
        self._origins.append(batch["origin"])
        self.cursor = batch.get("cursor")  # only a stream has one
        return (found.loss + found.regularizer * found.n_targets) / self.normalizer

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """One optimizer step, whole and in order.

        Lightning leaves everything after the closure to this hook. (`configure_gradient_clipping`
        could not skip the step.) Lightning also counts a skipped step; `progress.step` is the count
        that everything here uses.

        Raises:
            Diverged: the loss or the gradient is not finite, or the last of too many steps in a row
                is skipped; the weights are not changed.
        """
        config, progress = self.config, self.progress
        training = config.training

        # 1. training_step and backward of the last micro-batch. The gradient is now the sum over
        #    micro-batches of d(loss sum) / normalizer, and its mean over ranks.
        optimizer_closure()
        optimizer = self.trainer.optimizers[0]

        # 2. fp16: the loss was multiplied by the scaler's factor, so the gradient is too.
        #    Divide it out, once.
        plugin = self.trainer.precision_plugin
        scaler = plugin.scaler if isinstance(plugin, MixedPrecision) else None
        if scaler is not None:
            scaler.unscale_(optimizer)

        # 3. Rescale the gradient from loss sum / normalizer
        #    to the mean over all targets of the step.
        loss, n_targets, n_tokens, metrics = self._step_totals()
        n_batches = training.grad_accum_steps * self.trainer.world_size
        filled = n_targets / (self.normalizer * n_batches)  # 1.0: no padding anywhere
        gradients = [weight.grad for weight in self.parameters() if weight.grad is not None]
        if filled not in (0.0, 1.0):
            for gradient in gradients:
                gradient.mul_(1 / filled)

        # 4. Check loss and gradient, before they can reach the weights: not finite is an error.
        #    With training.skip_spikes it is a reason to skip the step, as is a value far above
        #    those of the last steps. With fp16 an infinite gradient is neither: the scaler skips
        #    the step and lowers its factor. Both are the same on every rank.
        norm = get_total_norm(gradients)
        progress.grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        is_skipped = self._is_spike(loss / max(n_targets, 1), scaled=scaler is not None)

        # 5. Clip: shrink the gradient to norm grad_clip if it is longer.
        if training.grad_clip is not None:
            clip_grads_with_norm_(self.parameters(), training.grad_clip, norm)

        # 6. Set the learning rate of this step.
        factor = multiplier(progress.step, training, progress.val_losses)
        set_lr(optimizer, factor)

        # 7. Step, or skip the step. Then free the gradients.
        if scaler is None:
            if not is_skipped:
                optimizer.step()
        else:
            if not is_skipped:
                scaler.step(optimizer)
            scaler.update()
        # Lightning would do it after the next forward pass, which would then hold both.
        optimizer.zero_grad()

        # 8. Count; nothing was trained in a skipped step.
        progress.step += 1
        progress.lr = training.lr * factor
        if not is_skipped:
            progress.tokens += n_tokens
            progress.loss_sum += loss
            progress.n_targets += n_targets
            old = progress.metric_sums or [0.0] * len(metrics)
            progress.metric_sums = [a + b for a, b in zip(old, metrics, strict=True)]
        self._losses.clear()
        self._origins.clear()

    def _step_totals(self) -> tuple[float, int, int, list[float]]:
        """Loss, targets, tokens and metrics of this step: sums over all micro-batches and ranks."""

        def total(parts: list[Tensor]) -> list[float]:
            return self.trainer.strategy.reduce(
                torch.stack(parts).sum(dim=0), reduce_op="sum"
            ).tolist()

        loss = total([part.loss for part in self._losses])
        counts = total([torch.stack((part.n_targets, part.n_tokens)) for part in self._losses])
        metrics = [part.metrics for part in self._losses if part.metrics is not None]
        return loss, *counts, total(metrics) if metrics else []

    def _is_spike(self, loss: float, *, scaled: bool) -> bool:
        """Whether this step must be skipped, which is logged; else it becomes part of the history.

        Raises:
            Diverged: as `optimizer_step`.
        """
        progress, factor = self.progress, self.config.training.skip_spikes
        norm = progress.grad_norm
        if scaled and math.isfinite(loss) and not math.isfinite(norm):
            return False  # the scaler skips it
        values = {"loss": loss, "gradient norm": norm}
        odd = next((name for name, value in values.items() if not math.isfinite(value)), None)
        found = None if odd is None else f"the {odd} is {values[odd]}"
        if found is None and factor is not None:
            found = spike_in(values, progress.recent, factor)
        if found is None:
            progress.skipped_in_a_row = 0
            if factor is not None:
                progress.recent = [*progress.recent, [loss, norm]][-WINDOW:]
            return False
        found = f"step {progress.step + 1}: {found}; rows at {self._origins}"
        fix = "Lower training.lr, or look at these rows"
        if factor is None:
            raise Diverged(f"{found}. The weights were not changed. {fix}")
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row == MAX_IN_A_ROW:
            raise Diverged(f"{found}. {MAX_IN_A_ROW} steps in a row were skipped. {fix}")
        logger.warning(f"{found}. The step is skipped ({progress.skipped_steps} so far)")
        return True


class LanguageModule(TrainingModule):
    """Next-token prediction: stage pretrain on all tokens,
    stage sft on the tokens of the answers.
    """

    def __init__(
        self,
        config: Config,
        decoder: "Decoder | HFModel",
        byte_lengths: Tensor,
        stage: str,
        references: dict[str, Any],
    ):
        super().__init__(config, decoder, stage, references)
        self.normalizer = config.training.micro_batch_size * config.training.seq_len
        self.val_columns = ("val_accuracy",) if stage == "sft" else ()
        self.register_buffer("byte_lengths", byte_lengths, persistent=False)

    def batch_loss(self, batch: Batch, *, label_smoothing: float) -> BatchLoss:
        """Cross entropy of the target tokens; a mixture of experts adds its balance loss."""
        if self.decoder.has_encoder:
            batch = self.decoder.prepare_batch(batch)
        features = self._features(batch["input_ids"], **extra_inputs(batch))
        labels = batch["labels"].flatten()  # (B·T,)
        loss = cross_entropy(
            features.hidden.flatten(0, 1),  # (B·T, D)
            self.decoder.head.weight,
            labels,
            label_smoothing=label_smoothing,
            softcap=self.decoder.head.softcap,
        )
        n_targets = (labels != IGNORE_INDEX).sum()
        return BatchLoss(loss, n_targets, n_targets, features.balance_loss * self.balance_coef)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The sums that eval_val.py takes too, so that both give the same number."""
        if self.decoder.has_encoder:
            batch = self.decoder.prepare_batch(batch)
        return batch_sums(self._features, self.decoder.head, batch, self.byte_lengths)

    def val_metrics(self, totals: list[float]) -> dict[str, float]:
        """Loss, perplexity, bits per byte; for answers also the share of tokens
        that are the most probable one.
        """
        score = language_score(*totals)
        metrics = {
            "val_loss": score.loss,
            "val_ppl": score.perplexity,
            "val_bpb": score.bits_per_byte,
        }
        return metrics | ({"val_accuracy": score.accuracy} if self.val_columns else {})


# --- the spike guard (training.skip_spikes): which steps are skipped ---
#
# A bad batch, or weights that begin to diverge, show as a loss or a gradient norm far above those
# of the last steps. Such a step is a spike: its value is above
#
#     median + factor · max(1.4826 · MAD, 1% of the median)        over the last 100 steps
#
# MAD is the median distance to the median. 1.4826 · MAD estimates the standard deviation of normal
# values, and unlike it is not moved by the outliers that it is to find (Rousseeuw and Croux 1993).
# A step with a value that is not a finite number is always a spike. Skipped steps do not enter the
# band: a loss that stays high is an error after `MAX_IN_A_ROW` steps, not a new normal. The history
# is in `Progress`, which each checkpoint stores, so that a resumed run skips the same steps.

WINDOW = 100  # steps
MIN_STEPS = 20  # before so many, a step has no band to be compared with
MAX_IN_A_ROW = 10
MAD_TO_STD = 1.4826  # 1 / the upper quartile of the normal distribution
MIN_SPREAD = 0.01  # of the median: the spread of values that hardly differ


def spike_in(values: dict[str, float], history: list[list[float]], factor: float) -> str | None:
    """Which of `values`, the finite loss and gradient norm of a step, is above its limit;
    None if none is.

    Args:
        values: by name.
        history: the values of the last steps, in the same order.
        factor: training.skip_spikes.

    >>> history = [[2.0, 1.0], [2.1, 1.0], [1.9, 1.0]] * 7
    >>> spike_in({"loss": 2.4, "gradient norm": 1.0}, history, 6)
    >>> spike_in({"loss": 4.0, "gradient norm": 1.0}, history, 6)
    'the loss is 4, above 2.89, the limit by the last 21 steps (median 2)'
    """
    if len(history) < MIN_STEPS:
        return None
    for (name, value), recent in zip(values.items(), zip(*history, strict=True), strict=True):
        middle = median(recent)
        mad = median(abs(old - middle) for old in recent)
        limit = middle + factor * max(MAD_TO_STD * mad, MIN_SPREAD * abs(middle))
        if value > limit:
            band = f"the limit by the last {len(history)} steps (median {middle:.4g})"
            return f"the {name} is {value:.4g}, above {limit:.4g}, {band}"
    return None
