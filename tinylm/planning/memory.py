"""The memory of this machine: how much of it a run can have, and what to do when a run has too little.

The parts of a run's need are in memory_plan.py.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tinylm.common.console import size
from tinylm.common.errors import UserError, first_line, is_out_of_memory
from tinylm.config.model import GATED
from tinylm.config.schema import Config

if sys.platform != "win32":
    import resource

# Bytes for each weight: the weight and its gradient, and what the optimizer keeps.
WEIGHT_BYTES = 8
OPTIMIZER_BYTES = {"adamw": 8, "adamw_plain": 8, "adamw_8bit": 2, "muon": 4, "sgd": 0}
# Bytes for each token of a micro-batch: its id and its label.
TOKEN_BYTES = 16
CGROUPS = Path("/sys/fs/cgroup")
# The files of a container's limit, its use, and in memory.stat the cached files in it: of cgroup
# version 2, then 1.
CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)


def resident_bytes() -> int:
    """Memory of this process; 0 if the system does not report it (only Linux does, in a file)."""
    if not sys.platform.startswith("linux"):
        return 0
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(device: str) -> int | None:
    """The most memory that this process has used so far, or that its tensors on a GPU have;
    None if the system does not report it.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux kilobytes


def available_bytes(device: str) -> int | None:
    """Memory of the device that a run could have beside what this process holds;
    None if it is not known.
    """
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if device == "cpu" and sys.platform.startswith("linux"):
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = dict(line.split(":") for line in file)
        free = int(sizes["MemAvailable"].split()[0]) * 1024
        return min([free, *_left_of_limits()])
    return None


def _left_of_limits() -> Iterator[int]:
    """The rest of each limit on this process."""
    # 1. of its address space (`ulimit -v`)
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        with open("/proc/self/statm", encoding="ascii") as file:
            yield max(0, limit - int(file.read().split()[0]) * resource.getpagesize())
    # 2. of a container, in which cached files do not count: they are dropped
    for limit_file, use_file, cached_files in CGROUP_FILES:
        path = CGROUPS / limit_file
        limit_text = path.read_text(encoding="ascii").strip() if path.is_file() else "max"
        if limit_text == "max":
            continue
        lines = path.with_name("memory.stat").read_text(encoding="ascii").splitlines()
        stat = dict(line.split() for line in lines)
        used = int((CGROUPS / use_file).read_text(encoding="ascii"))
        yield int(limit_text) - used + int(stat[cached_files])


def usable_bytes(device: str, *, program: int = 0, n_devices: int = 1) -> int | None:
    """Memory for one process of a run, `program` included; None if it is not known.

    Args:
        device: cpu, cuda or mps.
        program: bytes that the process holds before there is a model.
        n_devices: processes on this machine; on the CPU they share its memory.
    """
    available = available_bytes(device)
    if available is None:
        return None
    return program + available // (n_devices if device == "cpu" else 1)


# --- a run that has too little ---


def require_memory(config: Config, device: str) -> None:
    """Raise a UserError if new weights or a micro-batch of packed rows certainly do not fit,
    before anything is allocated: Linux would end the process without a word.

    The bounds are low: matrices with their gradients and optimizer state; for each token its id,
    its label, and the input of each block in 16 bits, which are kept for the backward pass.
    """
    available = available_bytes(device)
    if available is None:
        return
    model, training = config.model, config.training
    assert model.n_kv_heads and model.head_dim and model.d_ff, "resolved by the schema"
    heads = 2 * (model.n_heads + model.n_kv_heads)  # of query, key, value and output
    n_experts = model.moe.n_experts if model.moe else 1
    feed_forward = (3 if model.ffn in GATED else 2) * model.d_ff * n_experts
    rows_of_embedding = (model.vocab_size or 0) * (1 if model.tie_embeddings else 2)
    rows_of_embedding += model.bigram_rows
    n_weights = model.d_model * (
        rows_of_embedding + model.n_layers * (heads * model.head_dim + feed_forward)
    )
    n_shards = config.hardware.devices if config.hardware.strategy == "fsdp" else 1
    weights = n_weights * (WEIGHT_BYTES + OPTIMIZER_BYTES[training.optimizer]) // n_shards
    n_rows = 1 if training.micro_batch_size == "auto" else training.micro_batch_size
    n_tokens = n_rows * training.seq_len
    batch = n_tokens * (TOKEN_BYTES + 2 * model.n_layers * model.d_model)
    if weights + batch <= available:
        return
    fix = "Lower training.micro_batch_size or training.seq_len"
    if weights > batch:
        fix = "Lower model.d_model, model.n_layers or model.vocab_size"
        if model.bigram_rows > (model.vocab_size or 0):
            fix = "Lower model.bigram_rows, model.d_model or model.n_layers"
    raise UserError(
        "memory",
        f"a step needs at least {size(weights)} for the model and {size(batch)} for a micro-batch, "
        f"but only {size(available)} are available",
        f"{fix}; train.py --plan shows the parts",
    )


@contextmanager
def explain_out_of_memory(config: Config, intact: str) -> Iterator[None]:
    """Turn a lack of memory, on any device, or the end of a worker process into a UserError.

    Args:
        config: the settings of the run.
        intact: a sentence about what was not lost.

    Raises:
        UserError: with overrides that halve the memory of a step.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if str(error).startswith("DataLoader worker (pid"):
            problem = f"a worker process was killed, possibly out of memory: {first_line(error)}"
            fix = f"Free memory, or lower data.num_workers. {intact}"
            raise UserError("data.num_workers", problem, fix) from None
        if not is_out_of_memory(error):
            raise
        rows, tokens = config.training.micro_batch_size, config.training.seq_len
        raise UserError(
            "out of memory",
            f"a micro-batch of {rows} rows (training.micro_batch_size) of {tokens} tokens "
            f"(training.seq_len) does not fit: {first_line(error)}",
            f"Try {' '.join(_halve(config))}; train.py --plan shows what a run needs. {intact}",
        ) from None


def _halve(config: Config) -> Iterator[str]:
    """Overrides with which a step needs about half the memory."""
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
