"""What this machine can do and what it lacks: each finding with what would mend it.

Reading order: `Finding`, `examine`, then a function a subject. Nothing is changed: one
file is written into the current folder and removed again.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tinylm.common.errors import UserError, printable
from tinylm.common.hub import require_hub
from tinylm.planning.memory_plan import available_bytes

NEEDED = (
    "torch",
    "lightning",
    "transformers",
    "datasets",
    "tokenizers",
    "tiktoken",
    "pydantic",
    "pyyaml",
    "rich",
    "numpy",
    "filelock",
    "regex",
)
OPTIONAL = {
    "peft": "LoRA adapters",
    "matplotlib": "pictures",
    "gguf": "export to GGUF",
    "rouge-score": "the SAMSum task",
    "lm_eval": "tasks of lm-eval",
    "tensorboard": "training.loggers",
    "wandb": "training.loggers",
    "datatrove": "corpora beyond one machine",
}
GIGABYTE = 1e9
# A checkpoint of a 100M-parameter model is 1.2 GB, and a few of them stay.
LITTLE_DISK = 5 * GIGABYTE


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    found: str
    mend: str | None = None
    """what to do where something is missing; None: all is well"""
    needed: bool = True
    """whether training cannot do without it"""


def examine() -> Iterator[Finding]:
    """Everything, subject by subject."""
    yield Finding(
        "python",
        f"{platform.python_version()} on {platform.platform()}",
        None if sys.version_info >= (3, 11) else "install Python 3.11 or newer",
    )
    yield from packages()
    yield from devices()
    yield from precisions()
    yield compiler()
    yield from room()
    yield hub()


def packages() -> Iterator[Finding]:
    """The libraries that are needed, then those that add something."""
    for name in NEEDED:
        version = _version(name)
        yield Finding(name, version or "not installed", None if version else f"pip install {name}")
    for name, use in OPTIONAL.items():
        version = _version(name)
        yield Finding(
            name,
            f"{version} ({use})" if version else f"not installed ({use})",
            None if version else f"pip install {name}",
            needed=False,
        )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> Iterator[Finding]:
    """The CPU, every GPU, and MPS."""
    import torch

    yield Finding("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding(
            f"cuda:{index}",
            f"{printable(properties.name)}, {properties.total_memory / GIGABYTE:.1f} GB",
        )
    if not torch.cuda.is_available():
        yield Finding(
            "cuda",
            f"not here (PyTorch {torch.__version__})",
            "with a GPU: install the build of PyTorch for its driver",
            needed=False,
        )
    yield Finding(
        "mps", "available" if torch.backends.mps.is_available() else "not here (Apple silicon only)"
    )


def precisions() -> Iterator[Finding]:
    """Which values of hardware.precision this machine has."""
    import torch

    yield Finding("precision 32", "everywhere")
    if torch.cuda.is_available():
        there = torch.cuda.is_bf16_supported(including_emulation=False)
        yield Finding(
            "precision bf16",
            "supported" if there else "not in this GPU",
            None if there else "set hardware.precision: 16",
            needed=False,
        )
        yield Finding("precision 16", "supported")
        return
    fast = bool(
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    yield Finding(
        "precision bf16", "supported, fast on this CPU" if fast else "works, slowly on this CPU"
    )
    yield Finding("precision 16", "needs CUDA")


def compiler() -> Finding:
    """What torch.compile needs on a CPU."""
    name = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    mend = None if name else "install a C++ compiler, or leave hardware.compile off"
    return Finding(
        "hardware.compile",
        f"C++ compiler {name}" if name else "no C++ compiler",
        mend,
        needed=False,
    )


def room() -> Iterator[Finding]:
    """Memory, disk, and whether this folder can be written."""
    memory = available_bytes("cpu")
    if memory is not None:
        yield Finding("memory", f"{memory / GIGABYTE:.1f} GB available")
    free = shutil.disk_usage(Path.cwd()).free
    mend = (
        None if free > LITTLE_DISK else "make room, or set training.checkpoint_dir to another disk"
    )
    yield Finding(
        "disk", f"{free / GIGABYTE:.1f} GB free in {printable(Path.cwd())}", mend, needed=False
    )
    try:
        with tempfile.NamedTemporaryFile(dir=Path.cwd()) as file:
            os.fsync(file.fileno())
        yield Finding("writing", "this folder can be written")
    except OSError as error:
        yield Finding(
            "writing", f"this folder cannot be written: {error.strerror}", "work in another folder"
        )


def hub() -> Finding:
    """Whether names of datasets and models can be looked up."""
    try:
        require_hub("hub", "Use local files.")
    except UserError as error:
        why = str(error).partition(", and ")[2].partition(". ")[0]
        return Finding(
            "Hugging Face hub",
            why,
            "use local files; for what was downloaded before: HF_HUB_OFFLINE=1",
            needed=False,
        )
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    return Finding(
        "Hugging Face hub", "not asked: HF_HUB_OFFLINE is set" if offline else "reachable"
    )
