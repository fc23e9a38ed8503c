"""The memory of this machine: how much this process uses, and how much a run can have."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

if sys.platform != "win32":
    import resource

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
        return min([free, *_left_in_container(), *_left_of_limit()])
    return None


def _left_of_limit() -> Iterator[int]:
    """The rest of the address space of this process, if it is limited (`ulimit -v`)."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        with open("/proc/self/statm", encoding="ascii") as file:
            yield max(0, limit - int(file.read().split()[0]) * resource.getpagesize())


def _left_in_container() -> Iterator[int]:
    """The rest of the memory limit of a container, if there is one. Cached files do not count:
    they are dropped.
    """
    for limit_file, use_file, cached_files in CGROUP_FILES:
        path = CGROUPS / limit_file
        limit = path.read_text(encoding="ascii").strip() if path.is_file() else "max"
        if limit == "max":
            continue
        lines = path.with_name("memory.stat").read_text(encoding="ascii").splitlines()
        stat = dict(line.split() for line in lines)
        used = int((CGROUPS / use_file).read_text(encoding="ascii"))
        yield int(limit) - used + int(stat[cached_files])


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
