"""The cache of what a frozen model says: made once, whole or not at all, checked when it is read."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinylm.common.errors import UserError
from training.stages.cached_array import cached_array

VALUES = np.array([[-1.25, -2.5], [-3.0, -4.125]], dtype=np.float32)


def cached(path: Path, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """The array in the file, made of one part."""
    return cached_array(path, (2, 2), "<f4", lambda: iter([compute()]))


def test_log_probabilities_are_computed_once_and_read_to_the_last_bit(tmp_path):
    calls = []
    first = cached(tmp_path / "c" / "r.bin", lambda: calls.append(1) or VALUES)
    second = cached(tmp_path / "c" / "r.bin", lambda: calls.append(1) or VALUES)
    assert calls == [1]
    assert np.array_equal(first, VALUES) and np.array_equal(second, VALUES)


@pytest.mark.parametrize("seam", ["compute", "fsync", "replace"])
def test_a_process_killed_halfway_leaves_no_file(seam, tmp_path, monkeypatch):
    """A12: at each point of the write; the next run computes it again and has the same numbers."""

    class Killed(BaseException):
        pass

    def die(*args: Any) -> Any:
        raise Killed

    path = tmp_path / "r.bin"
    with monkeypatch.context() as patch:
        if seam != "compute":
            patch.setattr(os, seam, die)
        with pytest.raises(Killed):
            cached(path, die if seam == "compute" else lambda: VALUES)
    assert not path.exists()
    assert np.array_equal(cached(path, lambda: VALUES), VALUES)
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".lock"] == ["r.bin"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw[:40] + bytes([raw[40] ^ 1]) + raw[41:],
        lambda raw: b"",
        lambda raw: raw + b"1",
    ],
)
def test_a_damaged_file_is_named(damage, tmp_path):
    path = tmp_path / "r.bin"
    cached(path, lambda: VALUES)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        UserError,
        match=r"r.bin: the content does not match its checksum. Delete the file; it is computed again.",
    ):
        cached(path, lambda: VALUES)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError,
        match=r"file: cannot be written: File exists. Change data.cache_dir, or move the file",
    ):
        cached(tmp_path / "file" / "r.bin", lambda: VALUES)
