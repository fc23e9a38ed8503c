"""The device of a run, with the reason for the choice,
and what the memory allocator does with memory that is freed.
"""

from typing import TYPE_CHECKING

from tinylm.common.errors import UserError

if TYPE_CHECKING:
    import ctypes

    import torch


NAMES = ("auto", "cpu", "cuda", "mps")


def autocast_dtype(precision: str) -> "torch.dtype | None":
    """The dtype of matrix products under autocast for a hardware.precision; None for 32."""
    import torch

    return {"32": None, "16": torch.float16, "bf16": torch.bfloat16}[precision]


def pick_device(name: str, *, key: str = "--device") -> tuple[str, str]:
    """The device for `name` on this machine, and the reason; auto takes CUDA, else MPS,
    else the CPU.

    Args:
        name: auto, cpu, cuda or mps.
        key: the flag or setting that `name` comes from, for the error.

    Raises:
        UserError: CUDA or MPS is requested and this machine, or this build of PyTorch, has none.
    """
    if name not in NAMES:
        raise ValueError(f"device must be one of {', '.join(NAMES)}, got {name}")
    import torch  # late: it takes a second, which --help must not pay

    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        reasons = {
            "cuda": "CUDA is available",
            "mps": "MPS is available, CUDA is not",
            "cpu": "neither CUDA nor MPS is available",
        }
        return available[0], reasons[available[0]]
    if name not in available:
        problem = f"{name} is not available with PyTorch {torch.__version__} on this machine"
        raise UserError(key, problem, f"Choose auto or one of: {', '.join(available)}")
    return name, "requested"


# Names from glibc's malloc.h, which Python does not have.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


def keep_freed_memory() -> None:
    """Let this process keep the memory that a training step frees, for the next step.

    A step on the CPU frees all its activations. By default glibc returns those pages to the kernel,
    and the next step faults them in again, zeroed: a seventh of a bf16 step (docs/LOG.md). Other C
    libraries are left alone.
    """
    libc = _glibc()
    if libc is not None:
        # 2**25 is the most that glibc before 2.35 accepts; a larger tensor is then mapped
        # and unmapped each time.
        _ = libc.mallopt(_M_MMAP_THRESHOLD, 2**30) or libc.mallopt(_M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def share_one_heap() -> None:
    """Let all threads allocate from one heap: for a server, which frees a model and loads another
    in another thread.

    By default glibc gives a thread a heap of its own, and the tens of MB at its end, which only
    this thread can use again, stay even after `return_freed_memory` (docs/LOG.md). To be called
    before there are threads.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_ARENA_MAX, 1)


def return_freed_memory() -> None:
    """Return to the kernel what this process has freed, even if `keep_freed_memory` keeps it: after
    the weights of a model were made smaller, or when a server has no text. Only glibc.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> "ctypes.CDLL | None":
    """The C library of this process, if it is glibc."""
    # Imported here, because the flags of every program read NAMES: a tenth of the time of `--help`.
    import ctypes
    import platform

    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
