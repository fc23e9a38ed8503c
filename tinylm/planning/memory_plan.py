"""What a run will cost, before it runs: parameters, work, and memory by part.

    plan_run        settings ─▶ Plan: a step is taken with tensors that have no contents, and what is alive at its peak counted
    room            memory that a run could have on this machine
    advice          settings that are too large ─▶ the mildest overrides of them with which the run fits
    largest_batch   settings ─▶ the largest micro-batch that fits

Knows nothing of data: what a batch is made of costs little. How fast this machine is, `tinylm/planning/probes.py` finds out.
"""

import os
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tinylm.common.errors import UserError, printable
from tinylm.config.schema import Config
from tinylm.model.decoder import Decoder, active_parameters, count_parameters, flops_per_token
from tinylm.optim.optimizers import make_optimizer
from tinylm.planning.probes import autocast, batch_loss

FLOAT_BYTES = 4
# Hoffmann et al. 2022: about so many tokens a parameter train the best model that a given amount of work can buy.
CHINCHILLA_TOKENS = 20
# What glibc's malloc takes beyond the tensors, fitted to eighteen runs of benchmarks/planner.py: pages of libraries that
# only a step touches, gaps of the size of the largest activation that nothing fits into, and a splinter beside each
# tensor that it ever handed out (an aligned one is cut from a larger piece, and the splinters keep it from being whole
# again). Other allocators were not measured.
CPU_PAGES = 16e6
CPU_GAPS = 5.2
CPU_SPLINTERS = 0.041
# A guess: no graphics card was at hand. Of what is alive, weights and optimizer left out, what torch's own allocator cannot use.
GPU_GAPS = 0.15
# FSDP holds the block that is computed whole, and the next one that is on its way.
WHOLE_BLOCKS = 2


@dataclass(frozen=True)
class Plan:
    """What a run needs, and of memory what one device does at its peak, in bytes."""

    parameters: int
    active_parameters: int
    """those that one token meets: all but the experts that it is not sent to"""
    flops_per_token: int
    """forward and backward, of one target token"""
    tokens: int
    """target tokens of the whole run"""
    checkpoint_bytes: int
    """a little less than a checkpoint, which also holds the tokenizer"""
    checkpoint_files: int | None
    """the most that are there at a time; None: all stay"""
    program: int
    """the interpreter and its libraries"""
    weights: int
    gradients: int
    optimizer: int
    """what it remembers of each weight"""
    activations: int
    """what the forward pass keeps for the backward pass"""
    logits: int
    """the chunk of logits that is alive at once, and the gradients that the loss hands over"""
    scratch: int
    """what is in work, and what the allocator cannot use again"""

    @property
    def flops(self) -> int:
        """Of the whole run."""
        return self.flops_per_token * self.tokens

    @property
    def tokens_per_parameter(self) -> float:
        """To be held beside CHINCHILLA_TOKENS."""
        return self.tokens / self.parameters

    @property
    def parts(self) -> dict[str, int]:
        """The memory by part."""
        return {name: value for name, value in vars(self).items() if name in PARTS}

    @property
    def peak(self) -> int:
        """The most that is alive at once."""
        return sum(self.parts.values())


PARTS = ("program", "weights", "gradients", "optimizer", "activations", "logits", "scratch")


def plan_run(config: Config, device: str, *, program: int = 0) -> Plan:
    """What the settings need on devices of that kind; model.vocab_size must be filled in.

    Args:
        program: bytes that the process has before there is a model, as `resident_bytes` gives them.

    Raises:
        ValueError: the vocabulary is not known.
    """
    training, hardware = config.training, config.hardware
    processes = hardware.devices * hardware.num_nodes
    with torch.device("meta"):
        model = Decoder(config.model)
    n = count_parameters(model)
    # On a graphics card attention keeps no dropout mask; the tensors are traced with the CPU's operations, where it does.
    step = trace_step(
        with_settings(config, {"model.attention_dropout": 0.0}) if device == "cuda" else config
    )
    at_peak = dict.fromkeys(PARTS, 0) | step.at_peak
    state = step.state
    at_peak["scratch"] += _lost_to_allocator(step, device)
    if hardware.strategy == "fsdp":
        at_peak = {
            name: size // processes if name in ("weights", "gradients", "optimizer") else size
            for name, size in at_peak.items()
        }
        at_peak["scratch"] += _gathered_bytes(model)
    elif processes > 1 or hardware.strategy == "ddp":
        at_peak["gradients"] += n * FLOAT_BYTES  # the buckets that are sent to the other processes
    return Plan(
        parameters=n,
        active_parameters=active_parameters(model),
        flops_per_token=flops_per_token(model, training.seq_len),
        tokens=training.max_steps
        * training.grad_accum_steps
        * training.micro_batch_size
        * training.seq_len
        * processes,
        checkpoint_bytes=n * FLOAT_BYTES + state,
        # Beside those that stay: an older one that is best, and the one that is being written.
        checkpoint_files=None if training.keep_last is None else training.keep_last + 2,
        **at_peak | {"program": program},
    )


def _gathered_bytes(model: Decoder) -> int:
    """What a device holds of weights and gradients that FSDP has put together: all but the blocks, and some blocks."""
    block = count_parameters(model.blocks[0])
    rest = count_parameters(model) - block * len(model.blocks)
    return 2 * FLOAT_BYTES * (rest + WHOLE_BLOCKS * block)


def _lost_to_allocator(step: "Step", device: str) -> int:
    if device == "cpu":
        return round(CPU_PAGES + CPU_GAPS * step.largest + CPU_SPLINTERS * step.allocated)
    return round(
        GPU_GAPS
        * sum(size for name, size in step.at_peak.items() if name not in ("weights", "optimizer"))
    )


# --- a step without contents ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """The memory of one optimizer step."""

    at_peak: dict[str, int]
    """bytes by part, when most are alive"""
    state: int
    """what the optimizer remembers"""
    largest: int
    """the largest activation"""
    allocated: int
    """all that was ever asked for, from the first micro-batch to the optimizer's step"""


class Meter(TorchDispatchMode):
    """Counts the bytes of every tensor that is made while it is on, by part, until it is gone.

    What comes into being belongs to the part that is set at the time. The mode also answers what tensors without contents
    cannot say: every token is a target, and all experts are visited alike.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = "weights"
        self.alive = dict.fromkeys(PARTS, 0)
        self._owners: dict[int, tuple[str, int]] = {}
        self._visits: deque[int] = deque()
        self.start_anew()

    def start_anew(self) -> None:
        """Forget the peak, and what was asked for so far."""
        self.at_peak, self.peak = dict(self.alive), sum(self.alive.values())
        self.largest = self.allocated = 0

    def hand_over(self, tensor: Tensor, part: str) -> None:
        """Count a tensor under another part from now on."""
        key = tensor.untyped_storage()._cdata
        before, size = self._owners[key]
        self._owners[key] = (part, size)
        self.alive[before] -= size
        self.alive[part] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._answer(func, args)
        if result is None:
            result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return result

    def _answer(self, func: Any, args: Any) -> Any:
        """The result of an operation that would have to look at contents; None for the others."""
        aten = torch.ops.aten
        if func is aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if func is aten.bincount.default:  # (expert of each visit, no weights, number of experts)
            visits, n_experts = args[0].numel(), args[2]
            self._visits = deque(
                visits // n_experts + (n < visits % n_experts) for n in range(n_experts)
            )
            return args[0].new_empty((n_experts,), dtype=torch.int64)
        if (
            func is aten._local_scalar_dense.default
        ):  # the sizes of the experts' groups are asked for in turn, twice
            self._visits.rotate(-1)
            return self._visits[-1]
        return None

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._owners:  # a view, or what was changed in place
            return
        # In the backward pass autograd is on only while a block is computed again.
        part = "activations" if self.part == "scratch" and torch.is_grad_enabled() else self.part
        self._owners[key] = (part, size)
        weakref.finalize(storage, self._forget, key)
        self.alive[part] += size
        self.allocated += size
        if part == "activations":
            self.largest = max(self.largest, size)
        if sum(self.alive.values()) > self.peak:
            self.at_peak, self.peak = dict(self.alive), sum(self.alive.values())

    def _forget(self, key: int) -> None:
        part, size = self._owners.pop(key)
        self.alive[part] -= size


def trace_step(config: Config) -> Step:
    """The memory of an optimizer step as training takes it (model.py), when the optimizer has taken one before."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # half a second

    training = config.training
    with FakeTensorMode(), Meter() as meter:
        # How weights begin takes no memory afterwards, and truncating would look at contents.
        model = Decoder(config.model.model_copy(update={"init": "normal"})).train()
        optimizer = make_optimizer(model, training, fused=config.hardware.precision != "16")
        for weight in model.parameters():
            weight.register_post_accumulate_grad_hook(
                lambda weight: meter.hand_over(weight.grad, "gradients")
            )
        meter.part = "gradients"
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        meter.part = "optimizer"
        optimizer.step()
        optimizer.zero_grad()
        state = meter.alive["optimizer"]
        meter.start_anew()
        for _ in range(
            min(2, training.grad_accum_steps)
        ):  # the second one finds gradients there, and so do all others
            _trace_micro_batch(model, config, meter)
        meter.part = "scratch"
        optimizer.step()
        return Step(meter.at_peak, state, meter.largest, meter.allocated)


def _trace_micro_batch(model: Decoder, config: Config, meter: Meter) -> None:
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


# --- this machine -----------------------------------------------------------------------------------------------------

CGROUPS = Path("/sys/fs/cgroup")


def resident_bytes() -> int:
    """Memory of this process; 0 where the system does not say (only Linux does so in a file)."""
    if not sys.platform.startswith("linux"):
        return 0
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def available_bytes(device: str) -> int | None:
    """Memory that a run could have on this device beside what this process has; None where nobody knows."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if device == "cpu" and sys.platform.startswith("linux"):
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = dict(line.split(":") for line in file)
        return min([int(sizes["MemAvailable"].split()[0]) * 1024, *_left_in_container()])
    return None


def _left_in_container() -> Iterator[int]:
    """What the limit of a container leaves; nothing where there is no limit. Files in memory give way, and do not count."""
    for limit, used, files in (
        ("memory.max", "memory.current", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "total_inactive_file",
        ),  # of the older version
    ):
        if (CGROUPS / limit).is_file() and (
            text := (CGROUPS / limit).read_text(encoding="ascii").strip()
        ) != "max":
            details = dict(
                line.split()
                for line in (CGROUPS / limit)
                .with_name("memory.stat")
                .read_text(encoding="ascii")
                .splitlines()
            )
            yield (
                int(text) - int((CGROUPS / used).read_text(encoding="ascii")) + int(details[files])
            )


def room(config: Config, device: str, *, program: int = 0) -> int | None:
    """Memory for one process of a run, what it has already counted in; None where nobody knows."""
    available = available_bytes(device)
    if available is None:
        return None
    # On the CPU all processes of a machine have the same memory.
    return program + available // (config.hardware.devices if device == "cpu" else 1)


@contextmanager
def explaining_memory(config: Config, saved: str) -> Iterator[None]:
    """Turn a lack of memory, on whatever device, into a UserError that names what to lower; `saved` says what is intact.

    A CPU and Apple's GPU have no exception of their own for it, only words.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        training = config.training
        found = f"a micro-batch of {training.micro_batch_size} rows (training.micro_batch_size) of {training.seq_len} tokens (training.seq_len) did not fit"
        why = printable(str(error).strip().partition("\n")[0]).rstrip(".")
        raise UserError(
            f"out of memory: {found}: {why}. Try {' '.join(_smaller(config))}; train.py --plan counts what a run needs. {saved}."
        ) from None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device had no more memory to give."""
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "can't allocate memory" in str(error)
        or "backend out of memory" in str(error)
    )


def _smaller(config: Config) -> Iterator[str]:
    """Overrides with which a step holds about half as much."""
    training = config.training
    if training.micro_batch_size > 1:
        rows = training.micro_batch_size * training.grad_accum_steps
        size = next(n for n in range(training.micro_batch_size // 2, 0, -1) if rows % n == 0)
        yield f"training.micro_batch_size={size}"
        yield f"training.grad_accum_steps={rows // size}"
    elif not config.model.gradient_checkpointing:
        yield "model.gradient_checkpointing=true"
    else:
        yield f"training.seq_len={max(1, training.seq_len // 2)}"


# --- what to change ---------------------------------------------------------------------------------------------------

# A micro-batch of more rows is no faster on anything.
LARGEST_BATCH = 4096


def advice(config: Config, device: str, room: int, *, program: int = 0) -> tuple[str, ...]:
    """The mildest overrides with which the run fits into `room` bytes; none if even the smallest rows and models are too large.

    In this order: smaller micro-batches and more of them a step, which changes nothing but the speed; blocks that are
    computed again; bf16; shorter rows; fewer blocks, which is another model.
    """
    base: dict[str, Any] = {}

    def peak(changes: dict[str, Any]) -> int:
        return plan_run(with_settings(config, base | changes), device, program=program).peak

    lowest = peak({})
    for ladder in _ladders(config, device):
        strongest = peak(ladder[-1])
        if strongest <= room:
            mildest = ladder[_first(lambda changes: peak(changes) <= room, ladder)]
            return tuple(f"{key}={_written(value)}" for key, value in (base | mildest).items())
        if strongest < lowest:  # bf16 costs a copy of the weights, which can be more than it saves
            base, lowest = base | ladder[-1], strongest
    return ()


def _ladders(config: Config, device: str) -> Iterator[list[dict[str, Any]]]:
    """Changes from mild to strong, and within each from the least of it to the most."""
    training, model = config.training, config.model
    size, rows = training.micro_batch_size, training.micro_batch_size * training.grad_accum_steps
    divisors = [n for n in range(size - 1, 0, -1) if size % n == 0]
    if divisors:
        yield [
            {"training.micro_batch_size": n, "training.grad_accum_steps": rows // n}
            for n in divisors
        ]
    if not model.gradient_checkpointing:
        yield [{"model.gradient_checkpointing": True}]
    if config.hardware.precision == "32" and (
        device == "cpu"
        or (device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    ):
        yield [{"hardware.precision": "bf16"}]
    lengths = [
        training.seq_len // n for n in (2, 4) if training.seq_len // n >= (config.data.stride or 1)
    ]
    if lengths:
        yield [{"training.seq_len": length} for length in lengths]
    if model.n_layers > 1:
        yield [{"model.n_layers": n} for n in range(model.n_layers - 1, 0, -1)]


def _first(fits: Callable[[dict[str, Any]], bool], ladder: list[dict[str, Any]]) -> int:
    """The index of the first rung that fits, where the last one does and each fits if one before it does."""
    low, high = 0, len(ladder) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(ladder[middle]) else (middle + 1, high)
    return low


def largest_batch(config: Config, device: str, room: int, *, program: int = 0) -> int:
    """The largest power of two that training.micro_batch_size can be within `room` bytes; 0 if a single row is too much."""
    size = 1
    while (
        size <= LARGEST_BATCH
        and plan_run(
            with_settings(config, {"training.micro_batch_size": size}), device, program=program
        ).peak
        <= room
    ):
        size *= 2
    return size // 2


def with_settings(config: Config, changes: dict[str, Any]) -> Config:
    """The settings with some of them, by dotted key, replaced.

    >>> with_settings(Config(), {"training.lr": 0.5, "model.n_layers": 2}).model.n_layers
    2
    """
    # Only what is written: a width that another setting decides follows it.
    plain = config.model_dump(mode="json", exclude_unset=True)
    for key, value in changes.items():
        section, name = key.split(".")
        plain.setdefault(section, {})[name] = value
    return Config.from_plain(plain)


def _written(value: Any) -> str:
    """A setting's value as YAML has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
