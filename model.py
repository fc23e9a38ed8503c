"""What is trained: LitStage, which every training stage shares, and LitLM, pretraining and supervised fine-tuning.

A stage knows its loss. LitStage knows the rest of an optimizer step, in this order: the loss of each micro-batch, its
gradient, the gradient divided by the target tokens of the whole step, the guard against numbers that are not finite,
clipping, the learning rate of this step, the step itself. Everything that a resumed run needs is in `progress` and in the
optimizer; dropout is seeded anew for each micro-batch, so there is no generator to restore.

The model itself is `tinylm/decoder.py`; what happens between the steps (validation, metrics, checkpoints) is `callbacks.py`.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from data import Batch
from tinylm.config import Config
from tinylm.decoder import Decoder
from tinylm.device import keep_freed_memory
from tinylm.errors import Diverged
from tinylm.evaluate import batch_sums
from tinylm.foreign import ForeignDecoder
from tinylm.losses import cross_entropy
from tinylm.optim import make_optimizer, set_lr
from tinylm.packing import IGNORE_INDEX
from tinylm.schedule import multiplier


@dataclass
class Progress:
    """Where a run is; plain numbers, stored in each checkpoint."""

    step: int = 0
    """optimizer steps done"""
    tokens: int = 0
    """target tokens trained on"""
    logged_loss: float = 0.0
    """sum of the losses of the tokens since the last row of metrics"""
    logged_tokens: int = 0
    """and their number"""
    train_loss: float | None = None
    """mean loss in the last row of metrics"""
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

    def to_plain(self) -> dict[str, Any]:
        """Plain types for a checkpoint; `Progress(**plain)` is the inverse."""
        return asdict(self)


class LitStage(L.LightningModule):
    """One optimizer step of any stage; a stage adds `batch_loss`."""

    stage: str
    roots: dict[str, Any]
    """what rebuilding the model from a checkpoint takes beside its settings and weights (`tinylm/checkpoint.py`)"""

    def __init__(self, config: Config, decoder: Decoder | ForeignDecoder, stage: str, roots: dict[str, Any]):
        super().__init__()
        self.config, self.decoder, self.stage, self.roots = config, decoder, stage, roots
        self.progress = Progress()
        self.cursor: list[int] | None = None
        self._step_loss: list[Tensor] = []
        self._step_targets: list[Tensor] = []
        self._step_origin: list[Any] = []

    def batch_loss(self, batch: Batch, *, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of the losses of a batch's targets, the number of targets, and a regulariser per target; all scalars."""
        raise NotImplementedError

    def on_fit_start(self) -> None:
        """Lightning's hook before training."""
        if self.device.type == "cpu":
            keep_freed_memory()

    def configure_model(self) -> None:
        """Under fsdp each block, and the rest, is cut into equal parts that live on one device each (Zhao et al. 2023)."""
        if self.config.hardware.strategy == "fsdp" and self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            assert isinstance(self.decoder, Decoder), "train.py refuses others"
            for block in self.decoder.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.decoder, mesh=mesh)
            register_fsdp_forward_method(self.decoder, "features")

    # --- one micro-batch ----------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one micro-batch for the backward pass.

        It is divided by a constant, the tokens of a full micro-batch, because the number of targets in the whole step is
        only known at its end; `configure_gradient_clipping` then puts the true mean in place of it.
        """
        self._reseed(batch_idx)
        loss, targets, regulariser = self.batch_loss(batch, label_smoothing=self.config.training.label_smoothing)
        self._step_loss.append(loss.detach())
        self._step_targets.append(targets)
        self._step_origin.append(batch["origin"])
        self.cursor = batch.get("cursor")  # only a stream has one
        return (loss + regulariser * targets) / self._full_batch

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """(loss sum, targets, bytes of the targets' text, targets predicted right) of one batch, in eval mode and without smoothing."""
        raise NotImplementedError

    def _reseed(self, batch_idx: int) -> None:
        """Make dropout a function of (seed, micro-batch, rank)."""
        k = self.progress.step * self.config.training.grad_accum_steps + len(self._step_loss)
        # The multipliers only have to keep different (seed, k, rank) apart, modulo the 64 bits that a seed has.
        torch.manual_seed((self.config.training.seed * 1_000_003 + k * 8_191 + self.global_rank + 1) % 2**63)

    @property
    def _full_batch(self) -> int:
        return self.config.training.micro_batch_size * self.config.training.seq_len

    # --- one optimizer step -------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The configured optimizer; the learning rate is set before each step, so there is no scheduler to restore."""
        # Fused AdamW unscales fp16 gradients inside its step, after they were clipped: clipping would be off.
        fused = self.config.hardware.precision != "16"
        return make_optimizer(self.decoder, self.config.training, fused=fused)

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
        """Turn the summed gradient into that of the mean over the step's targets, check it, clip it, set the learning rate."""
        loss, targets = self._step_totals()
        self._scale_gradient(targets)
        norm = self._clip()
        self._guard(loss, targets, norm)
        self.progress.grad_norm = norm
        training = self.config.training
        share = multiplier(self.progress.step, training, self.progress.val_losses)
        set_lr(optimizer, share)
        self.progress.lr = training.lr * share
        self.progress.tokens += targets
        self.progress.logged_loss += loss
        self.progress.logged_tokens += targets

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Take the step and count it."""
        super().optimizer_step(epoch, batch_idx, optimizer, *args, **kwargs)
        optimizer.zero_grad()  # Lightning would do it after the next forward pass, which then holds both
        self.progress.step += 1
        self._forget_step()

    def _forget_step(self) -> None:
        self._step_loss.clear()
        self._step_targets.clear()
        self._step_origin.clear()

    def _step_totals(self) -> tuple[float, int]:
        """Loss sum and number of targets of this step over all micro-batches and ranks."""
        reduce = self.trainer.strategy.reduce
        loss = reduce(torch.stack(self._step_loss).sum(), reduce_op="sum")
        targets = reduce(torch.stack(self._step_targets).sum(), reduce_op="sum")
        return float(loss), int(targets)

    def _scale_gradient(self, targets: int) -> None:
        """The gradient is that of loss sum / full batch, meaned over micro-batches and ranks; make it that of the mean."""
        world = self.trainer.world_size
        parts = self.config.training.grad_accum_steps * world
        share = targets / (self._full_batch * parts)
        if share not in (0.0, 1.0):
            for weight in self.parameters():
                if weight.grad is not None:
                    weight.grad.mul_(1 / share)

    def _clip(self) -> float:
        """The norm of the whole gradient before it was clipped to training.grad_clip."""
        limit = self.config.training.grad_clip
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), math.inf if limit is None else limit)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _guard(self, loss: float, targets: int, norm: float) -> None:
        """Stop before a step that would write numbers that are not finite into the weights.

        With fp16 an infinite norm alone is not an error: the gradient scaler skips the step and lowers its scale.
        """
        scaled = self.config.hardware.precision == "16"
        if math.isfinite(loss) and (scaled or math.isfinite(norm)):
            return
        what = f"the loss is {loss / max(targets, 1)}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        raise Diverged(f"step {self.progress.step + 1}: {what}; rows at {self._step_origin}. No step was taken. Lower training.lr, or look at these rows")


class LitLM(LitStage):
    """Next-token prediction: pretraining (stage `pretrain`), and supervised fine-tuning (stage `sft`), whose labels leave out the prompts."""

    def __init__(self, config: Config, decoder: Decoder | ForeignDecoder, byte_lengths: Tensor, stage: str, roots: dict[str, Any]):
        super().__init__(config, decoder, stage, roots)
        self.register_buffer("byte_lengths", byte_lengths, persistent=False)

    def configure_model(self) -> None:
        """Lightning's hook for what has to happen when devices and processes are known: sharding, then compiling."""
        super().configure_model()
        self._features = torch.compile(self.decoder.features) if self.config.hardware.compile else self.decoder.features

    def batch_loss(self, batch: Batch, *, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
        """Cross entropy summed over the targets; a mixture of experts adds its balance loss."""
        features = self._features(batch["input_ids"], document_ids=batch.get("document_ids"))
        labels = batch["labels"].flatten()
        loss = cross_entropy(features.hidden.flatten(0, 1), self.decoder.head.weight, labels, label_smoothing=label_smoothing)
        moe = self.config.model.moe
        regulariser = features.balance_loss * (0.0 if moe is None else moe.balance_coef)
        return loss, (labels != IGNORE_INDEX).sum(), regulariser

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """What `tinylm/evaluate.py` counts, so that training and eval_val.py give the same number."""
        return batch_sums(self._features, self.decoder.head, batch, self.byte_lengths)
