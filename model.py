"""What is trained: TrainingModule, which every training stage shares; LanguageModule, pretraining and supervised fine-tuning; DPOModule, preferences; VerifierModule.

A stage knows its loss, and the units that it is a mean over: target tokens, or pairs. TrainingModule knows the rest of an optimizer
step, in this order: the loss of each micro-batch, its gradient, the gradient divided by the units of the whole step, the
guard against numbers that are not finite, clipping, the learning rate of this step, the step itself. Everything that a
resumed run needs is in `progress` and in the optimizer; dropout is seeded anew for each micro-batch, so there is no
generator to restore.

The model itself is `tinylm/model/decoder.py`; what happens between the steps (validation, metrics, checkpoints) is `callbacks.py`.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from tinylm.common.device import keep_freed_memory
from tinylm.common.errors import Diverged
from tinylm.config.schema import Config
from tinylm.eval.perplexity import batch_sums, extra_inputs, language_score
from tinylm.model.decoder import Decoder
from tinylm.model.verifier import Verifier
from tinylm.objectives.cross_entropy import cross_entropy
from tinylm.optim.optimizers import make_optimizer, set_lr
from tinylm.optim.schedule import multiplier
from tinylm.tokens.batches import Batch
from tinylm.tokens.packing import IGNORE_INDEX

if TYPE_CHECKING:
    from tinylm.model.hf_model import HFModel


@dataclass
class Progress:
    """Where a run is; plain numbers, stored in each checkpoint."""

    step: int = 0
    """optimizer steps done"""
    tokens: int = 0
    """target tokens trained on"""
    logged_loss: float = 0.0
    """sum of the losses of the units since the last row of metrics"""
    logged_units: int = 0
    """and their number"""
    logged_measures: list[float] = field(default_factory=list)
    """and the sums of what else the stage measures"""
    train_loss: float | None = None
    """mean loss in the last row of metrics"""
    train_measures: list[float] = field(default_factory=list)
    """and the means of what else the stage measures"""
    lr: float = 0.0
    """learning rate of the last step"""
    grad_norm: float = 0.0
    """norm of its gradient, before clipping"""
    validations: list[list[float]] = field(default_factory=list)
    """[step, val_loss] of every validation"""

    @property
    def val_losses(self) -> list[float]:
        """Every validation loss, oldest first."""
        return [loss for _, loss in self.validations]

    def validated(self, step: int) -> bool:
        """Whether the validation of `step` was done."""
        return any(int(done) == step for done, _ in self.validations)

    def log(self, loss: float, units: int, measures: list[float]) -> None:
        """Count a step towards the next row of metrics; all are sums."""
        self.logged_loss += loss
        self.logged_units += units
        self.logged_measures = [
            before + now
            for before, now in zip(
                self.logged_measures or [0.0] * len(measures), measures, strict=True
            )
        ]

    def close_row(self) -> None:
        """Take the means of what was logged since the last row."""
        if self.logged_units:
            self.train_loss = self.logged_loss / self.logged_units
            self.train_measures = [total / self.logged_units for total in self.logged_measures]
            self.logged_loss, self.logged_units, self.logged_measures = 0.0, 0, []

    def to_plain(self) -> dict[str, Any]:
        """Plain types for a checkpoint; `Progress(**plain)` is the inverse."""
        return asdict(self)


class BatchLoss(NamedTuple):
    """What a stage makes of one micro-batch."""

    loss: Tensor
    """sum over the units, a scalar"""
    units: Tensor
    """how many targets, or pairs, the loss of a step is the mean over"""
    tokens: Tensor
    """target tokens"""
    regulariser: Tensor
    """what is minimised beside the loss, per unit"""
    measures: Tensor | None = None
    """sums over the units of what the stage's `measures` name"""


class TrainingModule(L.LightningModule):
    """One optimizer step of any stage; a stage adds its loss and what validation makes of it."""

    stage: str
    roots: dict[str, Any]
    """what rebuilding the model from a checkpoint takes beside its settings and weights (`tinylm/checkpoint/format.py`)"""
    full_batch: int
    """units of a micro-batch without padding"""
    measures: tuple[str, ...] = ()
    """columns of metrics.csv that only this stage has, of training rows"""
    val_measures: tuple[str, ...] = ()
    """and of validations"""

    def __init__(
        self,
        config: Config,
        decoder: "Decoder | HFModel | Verifier",
        stage: str,
        roots: dict[str, Any],
    ):
        super().__init__()
        self.config, self.decoder, self.stage, self.roots = config, decoder, stage, roots
        self.progress = Progress()
        self.cursor: list[int] | None = None
        self._step_parts: list[BatchLoss] = []
        self._step_origin: list[Any] = []

    def batch_loss(self, batch: Batch, *, label_smoothing: float) -> BatchLoss:
        """The loss of a micro-batch."""
        raise NotImplementedError

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sums over one batch, in eval mode and without smoothing, of which `val_metrics` takes the totals."""
        raise NotImplementedError

    def val_metrics(self, totals: list[float]) -> dict[str, float]:
        """val_loss and other columns of metrics.csv, from the sums over all batches and ranks."""
        raise NotImplementedError

    def on_fit_start(self) -> None:
        """Lightning's hook before training."""
        if self.device.type == "cpu":
            keep_freed_memory()

    def configure_model(self) -> None:
        """Lightning's hook for what has to happen when devices and processes are known: sharding, then compiling.

        Under fsdp each block, and the rest, is cut into equal parts that live on one device each (Zhao et al. 2023).
        """
        if self.config.hardware.strategy == "fsdp" and self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            assert isinstance(self.decoder, Decoder), "train.py refuses others"
            for block in self.decoder.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.decoder, mesh=mesh)
            register_fsdp_forward_method(self.decoder, "features")
        self._features = (
            torch.compile(self.decoder.features)
            if self.config.hardware.compile
            else self.decoder.features
        )

    @property
    def _balance_coef(self) -> float:
        """Weight of the balance loss of a mixture of experts."""
        return 0.0 if self.config.model.moe is None else self.config.model.moe.balance_coef

    # --- one micro-batch ----------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one micro-batch for the backward pass.

        It is divided by a constant, the units of a full micro-batch, because the number of units in the whole step is
        only known at its end; `configure_gradient_clipping` then puts the true mean in place of it.
        """
        self._reseed(batch_idx)
        part = self.batch_loss(batch, label_smoothing=self.config.training.label_smoothing)
        self._step_parts.append(
            part._replace(loss=part.loss.detach(), regulariser=part.regulariser.detach())
        )
        self._step_origin.append(batch["origin"])
        self.cursor = batch.get("cursor")  # only a stream has one
        return (part.loss + part.regulariser * part.units) / self.full_batch

    def _reseed(self, batch_idx: int) -> None:
        """Make dropout a function of (seed, micro-batch, rank)."""
        k = self.progress.step * self.config.training.grad_accum_steps + len(self._step_parts)
        # The multipliers only have to keep different (seed, k, rank) apart, modulo the 64 bits that a seed has.
        torch.manual_seed(
            (self.config.training.seed * 1_000_003 + k * 8_191 + self.global_rank + 1) % 2**63
        )

    # --- one optimizer step -------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The configured optimizer; the learning rate is set before each step, so there is no scheduler to restore."""
        # Fused AdamW unscales fp16 gradients inside its step, after they were clipped: clipping would be off.
        fused = self.config.hardware.precision != "16"
        return make_optimizer(self.decoder, self.config.training, fused=fused)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: Any = None,
        gradient_clip_algorithm: Any = None,
    ) -> None:
        """Turn the summed gradient into that of the mean over the step's units, check it, clip it, set the learning rate."""
        loss, units, tokens, measures = self._step_totals()
        self._scale_gradient(units)
        norm = self._clip()
        self._guard(loss, units, norm)
        self.progress.grad_norm = norm
        training = self.config.training
        share = multiplier(self.progress.step, training, self.progress.val_losses)
        set_lr(optimizer, share)
        self.progress.lr = training.lr * share
        self.progress.tokens += tokens
        self.progress.log(loss, units, measures)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Take the step and count it."""
        super().optimizer_step(epoch, batch_idx, optimizer, *args, **kwargs)
        optimizer.zero_grad()  # Lightning would do it after the next forward pass, which then holds both
        self.progress.step += 1
        self._forget_step()

    def _forget_step(self) -> None:
        self._step_parts.clear()
        self._step_origin.clear()

    def _step_totals(self) -> tuple[float, int, int, list[float]]:
        """Loss sum, units, tokens and sums of the measures of this step, over all micro-batches and ranks."""
        loss = self._total([part.loss for part in self._step_parts])
        counts = self._total([torch.stack((part.units, part.tokens)) for part in self._step_parts])
        measures = [part.measures for part in self._step_parts if part.measures is not None]
        units, tokens = counts.tolist()
        return float(loss), units, tokens, self._total(measures).tolist() if measures else []

    def _total(self, parts: list[Tensor]) -> Tensor:
        return self.trainer.strategy.reduce(torch.stack(parts).sum(dim=0), reduce_op="sum")

    def _scale_gradient(self, units: int) -> None:
        """The gradient is that of loss sum / full batch, meaned over micro-batches and ranks; make it that of the mean."""
        world = self.trainer.world_size
        parts = self.config.training.grad_accum_steps * world
        share = units / (self.full_batch * parts)
        if share not in (0.0, 1.0):
            for weight in self.parameters():
                if weight.grad is not None:
                    weight.grad.mul_(1 / share)

    def _clip(self) -> float:
        """The norm of the whole gradient before it was clipped to training.grad_clip."""
        limit = self.config.training.grad_clip
        norm = torch.nn.utils.clip_grad_norm_(
            self.parameters(), math.inf if limit is None else limit
        )
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _guard(self, loss: float, units: int, norm: float) -> None:
        """Stop before a step that would write numbers that are not finite into the weights.

        With fp16 an infinite norm alone is not an error: the gradient scaler skips the step and lowers its scale.
        """
        scaled = self.config.hardware.precision == "16"
        if math.isfinite(loss) and (scaled or math.isfinite(norm)):
            return
        what = (
            f"the loss is {loss / max(units, 1)}"
            if not math.isfinite(loss)
            else f"the gradient's norm is {norm}"
        )
        raise Diverged(
            f"step {self.progress.step + 1}: {what}; rows at {self._step_origin}. No step was taken. Lower training.lr, or look at these rows"
        )


class LanguageModule(TrainingModule):
    """Next-token prediction: pretraining (stage `pretrain`), and supervised fine-tuning (stage `sft`), whose labels leave out the prompts."""

    def __init__(
        self,
        config: Config,
        decoder: "Decoder | HFModel",
        byte_lengths: Tensor,
        stage: str,
        roots: dict[str, Any],
    ):
        super().__init__(config, decoder, stage, roots)
        self.full_batch = config.training.micro_batch_size * config.training.seq_len
        self.val_measures = ("val_accuracy",) if stage == "sft" else ()
        self.register_buffer("byte_lengths", byte_lengths, persistent=False)

    def batch_loss(self, batch: Batch, *, label_smoothing: float) -> BatchLoss:
        """Cross entropy of the target tokens; a mixture of experts adds its balance loss."""
        if self.decoder.has_encoder:
            batch = self.decoder.prepare_batch(batch)
        features = self._features(batch["input_ids"], **extra_inputs(batch))
        labels = batch["labels"].flatten()
        loss = cross_entropy(
            features.hidden.flatten(0, 1),
            self.decoder.head.weight,
            labels,
            label_smoothing=label_smoothing,
        )
        targets = (labels != IGNORE_INDEX).sum()
        return BatchLoss(loss, targets, targets, features.balance_loss * self._balance_coef)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """What `tinylm/eval/task_scores.py` counts, so that training and eval_val.py give the same number."""
        if self.decoder.has_encoder:
            batch = self.decoder.prepare_batch(batch)
        return batch_sums(self._features, self.decoder.head, batch, self.byte_lengths)

    def val_metrics(self, totals: list[float]) -> dict[str, float]:
        """Loss, perplexity, bits per byte; of answers also how many of their tokens are the most probable one."""
        score = language_score(*totals)
        metrics = {
            "val_loss": score.loss,
            "val_ppl": score.perplexity,
            "val_bpb": score.bits_per_byte,
        }
        return metrics | ({"val_accuracy": score.accuracy} if self.val_measures else {})
