"""Which device the work runs on, and why: picked once, said first. And what the CPU needs to train fast."""

import ctypes
import platform
from typing import TYPE_CHECKING

from tinylm.common.errors import UserError, printable

if TYPE_CHECKING:
    import torch


NAMES = ("auto", "cpu", "cuda", "mps")


def half_of(precision: str) -> "torch.dtype | None":
    """What hardware.precision makes products in under autocast: torch's type, None for 32."""
    import torch

    return {"32": None, "16": torch.float16, "bf16": torch.bfloat16}[precision]


def pick_device(name: str, *, key: str = "--device") -> tuple[str, str]:
    """The device that `name` means on this machine, and the reason in words; auto takes CUDA, else MPS, else the CPU.

    Args:
        name: auto, cpu, cuda or mps.
        key: the flag or setting that `name` came from, for the error.

    Raises:
        UserError: CUDA or MPS was asked for and this machine or this build of PyTorch has none.
    """
    if name not in NAMES:
        raise ValueError(f"device {printable(name)} is not one of {', '.join(NAMES)}")
    import torch  # late: it costs a second, and --help must not pay it

    found = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    available = [device for device, there in found.items() if there]
    if name == "auto":
        device = available[0]
        return device, {
            "cuda": "CUDA is available",
            "mps": "MPS is available, CUDA is not",
            "cpu": "neither CUDA nor MPS here",
        }[device]
    if name not in available:
        raise UserError(
            f"{key}: {name} was asked for, and PyTorch {torch.__version__} finds none here. Available: {', '.join(available)}. Take one of these, or auto."
        )
    return name, "asked for"


# Names of glibc's malloc.h, which Python does not have.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Have this process keep what a training step frees, for the next step, and not give it back to the kernel.

    A step on the CPU frees all its activations, and glibc would return the pages, which the next step then faults in
    anew, zeroed: a seventh of a bf16 step (docs/LOG.md). Other C libraries are left alone.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        # The second is the most that glibc before 2.35 takes; a tensor beyond the threshold is mapped and unmapped each time.
        _ = mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25)
        mallopt(_M_TRIM_THRESHOLD, -1)
