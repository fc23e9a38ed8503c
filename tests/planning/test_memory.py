"""The memory of this machine and of a container on it."""

import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinylm.planning import memory
from tinylm.planning.memory import available_bytes, resident_bytes, usable_bytes


def test_processes_on_one_cpu_share_its_memory(monkeypatch):
    """900 bytes for all of them, and the 100 that each has."""
    monkeypatch.setattr(memory, "available_bytes", lambda device: 900)
    assert usable_bytes("cpu", program=100) == 1000
    assert usable_bytes("cpu", program=100, n_devices=3) == 400
    assert usable_bytes("cuda", n_devices=3) == 900
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    assert usable_bytes("mps") is None


@pytest.fixture
def cgroups(tmp_path, monkeypatch) -> Iterator[Path]:
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("folder", "limit", "used", "files"),
    [
        (".", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_the_limit_of_a_container_counts(cgroups, folder, limit, used, files):
    """A limit of a megabyte; 600,000 bytes are used, of which 100,000 are cached files."""
    free = available_bytes("cpu")
    assert free is not None
    (cgroups / folder).mkdir(exist_ok=True)
    (cgroups / folder / limit).write_text("1000000\n")
    (cgroups / folder / used).write_text("600000\n")
    (cgroups / folder / "memory.stat").write_text(f"anon 500000\n{files} 100000\n")
    assert available_bytes("cpu") == 500_000
    (cgroups / folder / limit).write_text("max\n" if folder == "." else "9223372036854771712\n")
    assert available_bytes("cpu") == pytest.approx(free, rel=0.5)


def test_the_memory_of_this_process_includes_what_it_holds():
    before = resident_bytes()
    # New pages: a bytearray may reuse what this process has freed.
    with mmap.mmap(-1, 50_000_000) as held:
        for _ in range(50):
            held.write(b"x" * 1_000_000)
        assert resident_bytes() - before > 0.9 * len(held)
