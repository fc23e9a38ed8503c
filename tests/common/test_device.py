"""Which device is picked, and what is said of it (FAULTS F6)."""

import platform
import subprocess
import sys

import pytest
import torch

from tinylm.common.device import pick_device
from tinylm.common.errors import UserError


@pytest.fixture
def machine(monkeypatch):
    """Pretends that this machine has CUDA, MPS, both or neither."""

    def pretend(*, cuda: bool = False, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(
    ("has", "picked"),
    [
        ({"cuda": True, "mps": True}, ("cuda", "CUDA is available")),
        ({"mps": True}, ("mps", "MPS is available, CUDA is not")),
        ({}, ("cpu", "neither CUDA nor MPS here")),
    ],
)
def test_auto_takes_cuda_then_mps_then_the_cpu(machine, has, picked):
    machine(**has)
    assert pick_device("auto") == picked


def test_the_device_asked_for_is_taken_where_a_better_one_is(machine):
    machine(cuda=True, mps=True)
    assert pick_device("cpu") == ("cpu", "asked for")
    assert pick_device("mps") == ("mps", "asked for")


@pytest.mark.parametrize(
    ("name", "has", "available"), [("cuda", {"mps": True}, "mps, cpu"), ("mps", {}, "cpu")]
)
def test_an_absent_device_is_an_error_that_says_what_is_available(machine, name, has, available):
    machine(**has)
    with pytest.raises(UserError) as error:
        pick_device(name, key="hardware.accelerator")
    assert str(error.value) == (
        f"hardware.accelerator: {name} was asked for, and PyTorch {torch.__version__} finds none here. Available: {available}. Take one of these, or auto."
    )


def test_a_name_that_is_no_device_is_a_callers_mistake():
    with pytest.raises(ValueError, match="device gpu is not one of auto, cpu, cuda, mps"):
        pick_device("gpu")


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="another C library's malloc is left alone"
)
def test_memory_that_was_let_go_is_taken_again_without_page_faults():
    """64 MB are 15,625 pages of 4 kB. Left alone, glibc maps a block of that size anew each time; kept, its pages are there."""
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
