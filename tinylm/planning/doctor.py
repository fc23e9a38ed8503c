"""What this machine can do and what is missing, with the fix for each.

Reading order: `Finding`, `examine`, then one function per subject. Nothing is changed: one file is
written into the current folder and removed again.
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

import torch

from tinylm.common.device import pick_device
from tinylm.common.errors import printable
from tinylm.common.hub import find_hub_problem
from tinylm.config.schema import ModelConfig
from tinylm.generate.engine import DEFAULT_SLOTS
from tinylm.generate.lean_step import MAX_COPIED_BYTES, lean_step_problem, matrix_kernel
from tinylm.model.decoder import Decoder
from tinylm.model.rounded import few_rows, multiplies_int8, rounding_problem
from tinylm.planning.memory import available_bytes

REQUIRED = (
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
    "llama-cpp-python": "the types q2_k to q6_k of GGUF",
    "llguidance": "constrained output",
    "rouge-score": "the SAMSum task",
    "lm_eval": "tasks of lm-eval",
    "tensorboard": "training.loggers",
    "wandb": "training.loggers",
    "trackio": "training.loggers",
    "datatrove": "corpora beyond one machine",
}
MEGABYTE, GIGABYTE = 1e6, 1e9
# A checkpoint of a 100M-parameter model is 1.2 GB, and several are kept.
LOW_DISK = 5 * GIGABYTE


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    subject: str
    found: str
    fix: str | None = None
    """what to do if something is missing; None: nothing is"""
    required: bool = True
    """whether training needs it"""


def examine() -> Iterator[Finding]:
    """All findings, subject by subject."""
    new_enough = sys.version_info >= (3, 11)
    yield Finding(
        "python",
        f"{platform.python_version()} on {platform.platform()}",
        None if new_enough else "install Python 3.11 or newer",
    )
    yield from packages()
    yield from devices()
    yield from precisions()
    yield compiler()
    yield from generation()
    yield from memory_and_disk()
    yield hub()


def packages() -> Iterator[Finding]:
    """The required libraries, then the optional ones."""
    for name in REQUIRED:
        version = _version(name)
        yield Finding(name, version or "not installed", None if version else f"pip install {name}")
    for name, use in OPTIONAL.items():
        version = _version(name)
        found = f"{version or 'not installed'} ({use})"
        yield Finding(name, found, None if version else f"pip install {name}", required=False)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> Iterator[Finding]:
    """The CPU, every GPU, and MPS."""
    yield Finding("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found = f"{printable(gpu.name)}, {gpu.total_memory / GIGABYTE:.1f} GB"
        yield Finding(f"cuda:{index}", found)
    if not torch.cuda.is_available():
        yield Finding(
            "cuda",
            f"not available (PyTorch {torch.__version__})",
            "with a GPU: install the build of PyTorch for its driver",
            required=False,
        )
    mps = torch.backends.mps.is_available()
    yield Finding("mps", "available" if mps else "not available (Apple silicon only)")


def precisions() -> Iterator[Finding]:
    """Which values of hardware.precision this machine supports."""
    yield Finding("precision 32", "supported")
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        yield Finding(
            "precision bf16",
            "supported" if bf16 else "not supported by this GPU",
            None if bf16 else "set hardware.precision: 16",
            required=False,
        )
        yield Finding("precision 16", "supported")
        return
    mkldnn = torch.backends.mkldnn.is_available()
    fast = bool(mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    yield Finding("precision bf16", f"supported, {'fast' if fast else 'slow'} on this CPU")
    yield Finding("precision 16", "needs CUDA")


def compiler() -> Finding:
    """The C++ compiler that torch.compile needs on a CPU."""
    name = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    return Finding(
        "hardware.compile",
        f"C++ compiler {name}" if name else "no C++ compiler",
        None if name else "install a C++ compiler, or keep hardware.compile off",
        required=False,
    )


def generation() -> Iterator[Finding]:
    """What generation uses here: what the programs do by default, then each value of --weights."""
    device, reason = pick_device("auto")
    yield Finding(
        "generation",
        f"{device} ({reason}), {torch.get_num_threads()} threads, {DEFAULT_SLOTS} texts at once, "
        "weights as in the checkpoint; with --deterministic a text is the same whatever is "
        "generated with it",
    )
    with torch.device("meta"):
        model = Decoder(ModelConfig(vocab_size=8, n_layers=1, d_model=16, n_heads=2))
    model = model.to_empty(device=device)
    problem = lean_step_problem(model)
    step = "lean step" if problem is None else f"step of decoder.py ({problem})"
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        found = step
        if problem is None:
            small, large = matrix_kernel(dtype, 0), matrix_kernel(dtype, MAX_COPIED_BYTES + 1)
            found += f", matrices {small.value}"
            if large is not small:
                limit = f"{MAX_COPIED_BYTES / MEGABYTE:.0f} MB"
                found += f", those above {limit} {large.value}"
        yield Finding(f"--weights {name}", found)
    kernels = {8: "_weight_int8pack_mm", 4: "_weight_int4pack_mm_for_cpu"}
    for bits, kernel in kernels.items():
        found = rounding_problem(device)
        if found is None:
            n_few = few_rows(bits, model.config.d_model)
            many = "oneDNN with inputs in 8 bits for more"
            if not multiplies_int8():
                many = "fp32 for more, as this CPU has no VNNI"
            found = f"{step}, {kernel} for up to {n_few} texts at once, {many}"
        yield Finding(f"--weights int{bits}", found)


def memory_and_disk() -> Iterator[Finding]:
    """Free memory and disk, and whether the current folder can be written."""
    memory = available_bytes("cpu")
    if memory is not None:
        yield Finding("memory", f"{memory / GIGABYTE:.1f} GB available")
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    yield Finding(
        "disk",
        f"{free / GIGABYTE:.1f} GB free in {printable(here)}",
        None if free > LOW_DISK else "free space, or set training.checkpoint_dir to another disk",
        required=False,
    )
    try:
        with tempfile.NamedTemporaryFile(dir=here) as file:
            os.fsync(file.fileno())
        yield Finding("writing", "this folder can be written")
    except OSError as error:
        found = f"this folder cannot be written: {error.strerror}"
        yield Finding("writing", found, "use another folder")


def hub() -> Finding:
    """Whether the Hugging Face hub can be reached."""
    subject = "Hugging Face hub"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return Finding(subject, "not checked: HF_HUB_OFFLINE is set")
    problem = find_hub_problem()
    fix = "use local files; if downloaded before, set HF_HUB_OFFLINE=1" if problem else None
    return Finding(subject, problem or "reachable", fix, required=False)
