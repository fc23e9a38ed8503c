"""The cost of a run before it starts: parameters, FLOPs, and memory by part.

    plan_run           settings -> RunPlan: a step is traced (step_memory.py), and the allocator's losses are added
    suggest_overrides  settings that need too much memory -> the mildest overrides with which the
    run fits
    largest_batch      settings -> the largest micro-batch that fits

Knows nothing of data: batches need little memory. probes.py measures how fast this machine is.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tinylm.config.schema import Config
from tinylm.model.decoder import (
    Decoder,
    active_parameters,
    count_parameters,
    flops_per_token,
    sized_parameters,
)
from tinylm.planning.step_memory import PARTS, StepMemory, trace_step

FLOAT_BYTES = 4
# Hoffmann et al. 2022: about this many tokens per parameter give the best model for a given amount
# of compute.
CHINCHILLA_TOKENS = 20
# What glibc's malloc needs beyond the tensors, fitted to eighteen runs of benchmarks/planner.py.
# Other allocators were not measured. PAGES: pages of libraries that only a step uses. GAPS: gaps of
# the size of the largest activation, which nothing fits into. SPLINTERS: a rest beside each tensor,
# which is cut from a larger piece to be aligned.
CPU_PAGES = 16e6
CPU_GAPS = 5.2
CPU_SPLINTERS = 0.041
# A guess, without a GPU to measure on: the share of everything but weights and optimizer that
# torch's allocator wastes.
GPU_GAPS = 0.15
# FSDP holds the block that is computed as a whole, and the next one, which is being gathered.
WHOLE_BLOCKS = 2
# A micro-batch of more rows is no faster on any device.
LARGEST_BATCH = 4096


@dataclass(frozen=True)
class RunPlan:
    """The resources of a run; memory is the peak of one device, in bytes."""

    parameters: int
    active_parameters: int
    """the parameters that one token uses: all but the experts that it is not sent to"""
    sized_parameters: int
    """those by which sizes of models are compared: all but the bigram embedding"""
    flops_per_token: int
    """forward and backward, per target token"""
    tokens: int
    """target tokens of the whole run"""
    checkpoint_bytes: int
    """slightly less than a checkpoint, which also holds the tokenizer"""
    checkpoint_files: int | None
    """the most that exist at a time; None: all are kept"""
    program: int
    """the interpreter and its libraries"""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """kept by the forward pass for the backward pass"""
    logits: int
    """one chunk of logits, and the gradients that the loss returns"""
    scratch: int
    """temporary tensors, and memory that the allocator cannot reuse"""

    @property
    def flops(self) -> int:
        """FLOPs of the whole run."""
        return self.flops_per_token * self.tokens

    @property
    def tokens_per_parameter(self) -> float:
        """To compare with CHINCHILLA_TOKENS."""
        return self.tokens / self.sized_parameters

    @property
    def parts(self) -> dict[str, int]:
        """The memory by part."""
        return {name: value for name, value in vars(self).items() if name in PARTS}

    @property
    def peak(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


def plan_run(config: Config, device: str, *, program: int = 0) -> RunPlan:
    """What the settings need on devices of this kind.

    Args:
        config: the settings, with model.vocab_size.
        device: cpu, cuda or mps.
        program: bytes that the process holds before there is a model (`resident_bytes`).

    Raises:
        ValueError: model.vocab_size is missing.
    """
    training, hardware = config.training, config.hardware
    processes = hardware.devices * hardware.num_nodes
    with torch.device("meta"):
        model = Decoder(config.model)
    n = count_parameters(model)
    # Attention on a GPU keeps no dropout mask; the trace uses the CPU's operations, which do.
    traced = with_settings(config, {"model.attention_dropout": 0.0}) if device == "cuda" else config
    step = trace_step(traced)
    at_peak = dict.fromkeys(PARTS, 0) | step.at_peak | {"program": program}
    at_peak["scratch"] += lost_to_allocator(step, device)
    if hardware.strategy == "fsdp":
        for part in ("weights", "gradients", "optimizer"):
            at_peak[part] //= processes
        at_peak["scratch"] += _gathered_bytes(model)
    elif processes > 1 or hardware.strategy == "ddp":
        at_peak["gradients"] += n * FLOAT_BYTES  # the buckets that are sent to the other processes
    rows_per_step = training.grad_accum_steps * training.micro_batch_size * processes
    return RunPlan(
        parameters=n,
        active_parameters=active_parameters(model),
        sized_parameters=sized_parameters(model),
        flops_per_token=flops_per_token(model, training.seq_len),
        tokens=training.max_steps * rows_per_step * training.seq_len,
        checkpoint_bytes=n * FLOAT_BYTES + step.optimizer_state,
        # Beside the kept ones: an older one that is the best, and the one that is being written.
        checkpoint_files=None if training.keep_last is None else training.keep_last + 2,
        **at_peak,
    )


def _gathered_bytes(model: Decoder) -> int:
    """Weights and gradients that FSDP gathers on a device: all but the blocks,
    and `WHOLE_BLOCKS` blocks.
    """
    block = count_parameters(model.blocks[0])
    rest = count_parameters(model) - block * len(model.blocks)
    return 2 * FLOAT_BYTES * (rest + WHOLE_BLOCKS * block)


def lost_to_allocator(step: StepMemory, device: str) -> int:
    """What the device's allocator needs beyond the tensors of a step."""
    if device == "cpu":
        return round(CPU_PAGES + CPU_GAPS * step.largest + CPU_SPLINTERS * step.allocated)
    temporary = sum(step.at_peak.values()) - step.at_peak["weights"] - step.at_peak["optimizer"]
    return round(GPU_GAPS * temporary)


# --- what to change ---


def suggest_overrides(
    config: Config, device: str, limit: int, *, program: int = 0
) -> tuple[str, ...]:
    """The mildest overrides with which the run fits into `limit` bytes;
    none if even the smallest model does not.

    In this order: smaller micro-batches, and more of them per step, which only changes the speed;
    gradient checkpointing; bf16; shorter rows; fewer layers, which is another model.
    """
    base: dict[str, Any] = {}

    def peak(changes: dict[str, Any]) -> int:
        return plan_run(with_settings(config, base | changes), device, program=program).peak

    lowest = peak({})
    for ladder in _ladders(config, device):
        strongest = peak(ladder[-1])
        if strongest <= limit:
            mildest = ladder[_first_fit(lambda changes: peak(changes) <= limit, ladder)]
            return tuple(f"{key}={_yaml_value(value)}" for key, value in (base | mildest).items())
        if strongest < lowest:  # bf16 costs a copy of the weights, which can be more than it saves
            base, lowest = base | ladder[-1], strongest
    return ()


def _ladders(config: Config, device: str) -> Iterator[list[dict[str, Any]]]:
    """Kinds of changes from mild to strong; each is a list of changes from mild to strong."""
    training, model = config.training, config.model
    size, rows = training.micro_batch_size, training.micro_batch_size * training.grad_accum_steps
    sizes = [n for n in range(size - 1, 0, -1) if size % n == 0]
    if sizes:
        yield [
            {"training.micro_batch_size": n, "training.grad_accum_steps": rows // n} for n in sizes
        ]
    if not model.gradient_checkpointing:
        yield [{"model.gradient_checkpointing": True}]
    if config.hardware.precision == "32" and _has_bf16(device):
        yield [{"hardware.precision": "bf16"}]
    lengths = [training.seq_len // n for n in (2, 4)]
    lengths = [length for length in lengths if length >= (config.data.stride or 1)]
    if lengths:
        yield [{"training.seq_len": length} for length in lengths]
    if model.n_layers > 1:
        yield [{"model.n_layers": n} for n in range(model.n_layers - 1, 0, -1)]


def _has_bf16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu"


def _first_fit(fits: Callable[[dict[str, Any]], bool], ladder: list[dict[str, Any]]) -> int:
    """The index of the first change that fits; the last one fits,
    and so does each after one that fits.
    """
    low, high = 0, len(ladder) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(ladder[middle]) else (middle + 1, high)
    return low


def largest_batch(
    config: Config, device: str, limit: int, *, program: int = 0, most: int = LARGEST_BATCH
) -> int:
    """The largest power of two for training.micro_batch_size, up to `most`, within `limit` bytes;
    0 if one row is too much.
    """

    def fits(rows: int) -> bool:
        changed = with_settings(config, {"training.micro_batch_size": rows})
        return plan_run(changed, device, program=program).peak <= limit

    size = 1
    while size <= most and fits(size):
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
    return Config.model_validate(plain)


def _yaml_value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
