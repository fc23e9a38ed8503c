"""The memory of an optimizer step, traced with tensors that have shapes but no contents.

`trace_step` builds the model with fake tensors, takes a step as training does, and records which
part (weights, activations, ...) holds how many bytes when the total is highest. `MemoryMeter`
counts; it counts real tensors as well.
"""

import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tinylm.config.schema import Config
from tinylm.model.decoder import Decoder
from tinylm.optim.adamw_8bit import trace_update
from tinylm.optim.optimizers import WeightwiseOptimizer, make_optimizer
from tinylm.planning.probes import autocast, batch_loss

PARTS = ("program", "weights", "gradients", "optimizer", "activations", "logits", "scratch")


@dataclass(frozen=True)
class StepMemory:
    """The memory of one optimizer step, in bytes."""

    at_peak: dict[str, int]
    """by part, when the total is highest"""
    optimizer_state: int
    largest: int
    """the largest activation"""
    allocated: int
    """all allocations together, from the first micro-batch to the optimizer's step"""


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of every tensor that is created while it is active, by part,
    until it is freed.

    A new tensor belongs to the part that is set at the time. The mode also answers what tensors
    without contents cannot: every token is a target, and all experts are visited equally often.

    Args:
        has_contents: the tensors are real, and answer for themselves.
    """

    def __init__(self, *, has_contents: bool = False) -> None:
        super().__init__()
        self.has_contents = has_contents
        self.part = "weights"
        self.alive = dict.fromkeys(PARTS, 0)
        self._owners: dict[int, tuple[str, int]] = {}
        self._visits: deque[int] = deque()
        self.restart()

    def adopt(self, tensor: Tensor, part: str) -> None:
        """Count a tensor that was created before, whose owner keeps it."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._owners:
            self._owners[storage._cdata] = (part, storage.nbytes())
            self.alive[part] += storage.nbytes()

    def restart(self) -> None:
        """Forget the peak and the allocations so far."""
        self.at_peak, self.peak = dict(self.alive), sum(self.alive.values())
        self.largest = self.allocated = 0

    def reassign(self, tensor: Tensor, part: str) -> None:
        """Count a tensor under another part from now on."""
        key = tensor.untyped_storage()._cdata
        before, size = self._owners[key]
        self._owners[key] = (part, size)
        self.alive[before] -= size
        self.alive[part] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = None if self.has_contents else self._answer(func, args)
        if result is None:
            result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _answer(self, func: Any, args: Any) -> Any:
        """The result of an operation that depends on contents; None for all others."""
        aten = torch.ops.aten
        if func is aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if func is aten.bincount.default:  # (expert of each visit, no weights, number of experts)
            n_visits, n_experts = args[0].numel(), args[2]
            share, rest = divmod(n_visits, n_experts)
            self._visits = deque(share + (n < rest) for n in range(n_experts))
            return args[0].new_empty((n_experts,), dtype=torch.int64)
        # The sizes of the experts' groups are read in turn, twice.
        if func is aten._local_scalar_dense.default:
            self._visits.rotate(-1)
            return self._visits[-1]
        return None

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._owners:  # a view, or changed in place
            return
        # In the backward pass, autograd is on only while a block is recomputed.
        part = "activations" if self.part == "scratch" and torch.is_grad_enabled() else self.part
        self._owners[key] = (part, size)
        weakref.finalize(storage, self._free, key)
        self.alive[part] += size
        self.allocated += size
        if part == "activations":
            self.largest = max(self.largest, size)
        total = sum(self.alive.values())
        if total > self.peak:
            self.at_peak, self.peak = dict(self.alive), total

    def _free(self, key: int) -> None:
        part, size = self._owners.pop(key)
        self.alive[part] -= size


def trace_step(config: Config) -> StepMemory:
    """The memory of an optimizer step as training takes it (model.py),
    after the optimizer's first.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # late: it takes half a second

    training = config.training
    with FakeTensorMode(), MemoryMeter() as meter:
        # The initialization takes no memory afterwards, and a truncated normal depends on contents.
        model = Decoder(config.model.model_copy(update={"init": "normal"})).train()
        if training.optimizer == "adamw_8bit":
            optimizer: Any = WeightwiseOptimizer(model.parameters(), trace_update)
        else:
            optimizer = make_optimizer(model, training, fused=config.hardware.precision != "16")
        for weight in model.parameters():
            weight.register_post_accumulate_grad_hook(
                lambda weight: meter.reassign(weight.grad, "gradients")
            )
        # A first step creates the state of the optimizer.
        meter.part = "gradients"
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        meter.part = "optimizer"
        optimizer.step()
        optimizer.zero_grad()
        state = meter.alive["optimizer"]
        # The second step is measured. Its second micro-batch has gradients in memory, like all
        # after it.
        meter.restart()
        for _ in range(min(2, training.grad_accum_steps)):
            _trace_micro_batch(model, config, meter)
        meter.part = "scratch"
        optimizer.step()
        return StepMemory(meter.at_peak, state, meter.largest, meter.allocated)


def _trace_micro_batch(model: Decoder, config: Config, meter: MemoryMeter) -> None:
    training = config.training
    meter.part = "activations"
    ids = torch.zeros(training.micro_batch_size, training.seq_len, dtype=torch.int64)
    documents = torch.zeros_like(ids) if config.data.document_mask else None
    with autocast(config, "cpu"):
        features = model.features(ids, document_ids=documents)
        meter.part = "logits"
        loss = batch_loss(model, features, ids, config)
    del features
    meter.part = "scratch"
    loss.backward()
