"""Which device is picked, and the reason that is printed."""

import platform
import subprocess
import sys

import pytest
import torch

from tinylm.common.device import pick_device
from tinylm.common.errors import UserError


@pytest.fixture
def machine(monkeypatch):
    """Simulate a machine with CUDA, MPS, both or neither."""

    def pretend(*, cuda: bool = False, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(
    ("has", "picked"),
    [
        ({"cuda": True, "mps": True}, ("cuda", "CUDA is available")),
        ({"mps": True}, ("mps", "MPS is available, CUDA is not")),
        ({}, ("cpu", "neither CUDA nor MPS is available")),
    ],
)
def test_auto_takes_cuda_then_mps_then_the_cpu(machine, has, picked):
    machine(**has)
    assert pick_device("auto") == picked


def test_a_requested_device_is_used_even_if_a_faster_one_is_available(machine):
    machine(cuda=True, mps=True)
    assert pick_device("cpu") == ("cpu", "requested")
    assert pick_device("mps") == ("mps", "requested")


@pytest.mark.parametrize(
    ("name", "has", "available"), [("cuda", {"mps": True}, "mps, cpu"), ("mps", {}, "cpu")]
)
def test_an_unavailable_device_is_an_error_that_lists_the_available_ones(
    machine, name, has, available
):
    machine(**has)
    with pytest.raises(UserError) as error:
        pick_device(name, key="hardware.accelerator")
    assert str(error.value) == (
        f"hardware.accelerator: {name} is not available with PyTorch {torch.__version__} "
        f"on this machine. Choose auto or one of: {available}."
    )


def test_an_unknown_device_name_is_a_value_error():
    with pytest.raises(ValueError, match="device must be one of auto, cpu, cuda, mps, got gpu"):
        pick_device("gpu")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is changed")
def test_freed_memory_is_reused_without_page_faults():
    """64 MB are 15,625 pages of 4 kB. By default glibc maps a block of that size again each time."""
    code = """
import resource
from tinylm.common.device import keep_freed_memory
keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = b"x" * 64_000_000
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 500


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is changed")
@pytest.mark.parametrize(("call", "keeps"), [("", True), ("share_one_heap()", False)])
def test_what_a_thread_has_freed_can_be_returned(call: str, keeps: bool) -> None:
    """The first 20 MB raise the size that glibc maps by itself, so that without the call 30 MB stay
    with the thread.
    """
    code = f"""
import os, threading
from tinylm.common.device import return_freed_memory, share_one_heap
{call}
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
def work():
    blocks = [b"x" * 5_000_000 for _ in range(6)]
    del blocks
block = b"x" * 20_000_000
del block
before = resident()
thread = threading.Thread(target=work)
thread.start()
thread.join()
return_freed_memory()
print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 20_000_000) == keeps
