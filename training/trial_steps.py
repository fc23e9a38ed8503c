"""Optimizer steps whose result is thrown away, to measure what the steps of a run need."""

import time

from torch import Tensor

from model import TrainingModule
from tinylm.model.nf4 import block_scales
from tinylm.optim.optimizers import make_optimizer, set_lr
from tinylm.planning.probes import autocast
from tinylm.planning.step_memory import MemoryMeter, StepMemory
from tinylm.tokens.packing import Batch

# Steps are timed for about this long, and at least so often: the allocator needs more memory in the
# first steps than the tensors do, because new tensors do not fit into the gaps of freed ones.
TIMED_SECONDS = 2.0
TIMED_STEPS = 3


class TrialSteps:
    """Optimizer steps as training takes them, without Lightning, at a learning rate of 0."""

    def __init__(self, module: TrainingModule, device: str):
        self.module, self.config, self.device = module.to(device).train(), module.config, device
        half = self.config.hardware.precision == "16"
        self.optimizer = make_optimizer(module.decoder, self.config.training, fused=not half)
        set_lr(self.optimizer, 0.0)
        self.meter = MemoryMeter(has_contents=True)
        module.configure_model()

    def take(self, batches: list[Batch]) -> None:
        """One optimizer step on these micro-batches."""
        for batch in batches:
            self.accumulate(batch)
        self.update()

    def accumulate(self, batch: Batch) -> None:
        """Add the gradient of a micro-batch."""
        self.meter.part = "activations"
        on_device = self.on_device(batch)
        with autocast(self.config, self.device):
            smoothing = self.config.training.label_smoothing
            found = self.module.batch_loss(on_device, label_smoothing=smoothing)
        loss = (found.loss + found.regularizer * found.n_targets) / self.module.normalizer
        self.meter.part = "scratch"
        loss.backward()

    def update(self) -> None:
        """The step of the optimizer."""
        self.meter.part = "scratch" if self.optimizer.state else "optimizer"
        self.optimizer.step()
        self.optimizer.zero_grad()

    def on_device(self, batch: Batch) -> Batch:
        """The micro-batch with its tensors on the device."""
        return {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def wait(self) -> None:
        """Wait for the device."""
        next(self.module.parameters()).flatten()[0].item()

    def memory(self, batches: list[Batch]) -> StepMemory:
        """The memory of a step on these micro-batches, after one that creates
        the state of the optimizer.
        """
        module, self.meter = self.module, MemoryMeter(has_contents=True)
        self.optimizer.state.clear()
        lora = self.config.lora
        scales = block_scales(module) if lora is not None and lora.base_weights == "nf4" else ()
        for tensor in (*module.parameters(), *module.buffers(), *scales):
            self.meter.adopt(tensor, "weights")
        hooks = [
            weight.register_post_accumulate_grad_hook(
                lambda weight: self.meter.reassign(weight.grad, "gradients")
            )
            for weight in module.parameters()
            if weight.requires_grad
        ]
        with self.meter as meter:
            self.take([rows_of(batches[0], 1)])
            state = meter.alive["optimizer"]
            meter.restart()
            self.take(batches)
        for hook in hooks:
            hook.remove()
        return StepMemory(meter.at_peak, state, meter.largest, meter.allocated)

    def seconds(self, batches: list[Batch]) -> float:
        """The time of a step on these micro-batches, whose sizes were seen before."""
        began, n_steps = time.perf_counter(), 0
        while n_steps < TIMED_STEPS or time.perf_counter() - began < TIMED_SECONDS:
            self.take(batches)
            n_steps += 1
            self.wait()
        return (time.perf_counter() - began) / n_steps


def rows_of(batch: Batch, n_rows: int) -> Batch:
    """The first rows of a micro-batch."""
    return {
        name: value[:n_rows] if isinstance(value, Tensor | list) else value
        for name, value in batch.items()
    }
