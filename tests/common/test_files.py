"""Files and folders are written whole or not at all, after errors and with concurrent writers."""

import multiprocessing
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from tinylm.common.errors import UserError
from tinylm.common.files import atomic_path, locked, make_once, publish, write_atomic


class Killed(BaseException):
    """Stands in for a kill: no `except Exception` sees it."""


def die(*_: Any) -> None:
    raise Killed


def names(folder: Path) -> list[str]:
    """What is in the folder besides locks."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_text_is_written_as_it_is_and_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_atomic(path, "é\r\n", "--out")
    assert path.read_bytes() == b"\xc3\xa9\r\n"
    write_atomic(path, b"\0", "--out")
    assert path.read_bytes() == b"\0"
    assert names(path.parent) == ["a.txt"]


def test_a_path_that_cannot_be_written_names_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "a.txt"
    with pytest.raises(UserError) as caught:
        write_atomic(path, "text", "--out")
    assert caught.value.where == (str(path),)
    assert (
        str(caught.value)
        == f"{path}: cannot be written: File exists. Change --out, or move the file that is there."
    )


def test_the_file_is_synced_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace

    def note_sync(handle: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def note_replace(old: Path, new: Path) -> None:
        calls.append(f"{old.name} -> {new.name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_atomic(tmp_path / "a.txt", "text", "--out")
    assert calls == ["file", ".a.txt.tmp -> a.txt", "folder"]


@pytest.mark.parametrize("seam", ["fsync", "replace"])
def test_a_kill_halfway_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seam: str
) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "old", "--out")
    with monkeypatch.context() as patch:
        patch.setattr(os, seam, die)
        with pytest.raises(Killed):
            write_atomic(path, "new", "--out")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    """A kill leaves the temporary file, or folder, which the next writer must not trip over."""
    (tmp_path / ".a.txt.tmp").write_text("half")
    (tmp_path / ".b.tmp").mkdir()
    (tmp_path / ".b.tmp" / "half").write_text("half")
    write_atomic(tmp_path / "a.txt", "whole", "--out")
    with atomic_path(tmp_path / "b") as folder:
        folder.mkdir()
        (folder / "whole").write_text("whole")
    assert names(tmp_path) == ["a.txt", "b"]
    assert names(tmp_path / "b") == ["whole"]


def test_a_folder_is_published_with_its_content_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sync for each file, each folder and the parent: a.txt, sub, sub/b.txt, made, tmp_path."""
    made = tmp_path / "made"
    (made / "sub").mkdir(parents=True)
    (made / "a.txt").write_text("a")
    (made / "sub" / "b.txt").write_text("b")
    calls = []
    monkeypatch.setattr(os, "fsync", calls.append)
    publish(made, tmp_path / "final")
    assert len(calls) == 5
    assert names(tmp_path) == ["final"]


def test_a_folder_with_content_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("mine")
    with pytest.raises(OSError, match="not empty"), atomic_path(tmp_path / "a") as folder:
        folder.mkdir()
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["mine"]


def test_make_once_makes_a_file_once(tmp_path: Path) -> None:
    path, calls = tmp_path / "cache" / "a", []

    def make(temporary: Path) -> None:
        calls.append(temporary)
        temporary.write_text("made", encoding="utf-8")

    for _ in range(2):
        make_once(path, make, setting="data.cache_dir")
    assert calls == [path.with_name(".a.tmp")]
    assert path.read_text() == "made"


def test_make_once_starts_again_after_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(Killed):
        make_once(path, lambda temporary: die(temporary.write_text("half")), setting="x")
    assert names(tmp_path) == []
    make_once(path, lambda temporary: temporary.write_text("whole"), setting="x")
    assert path.read_text() == "whole"


def test_make_once_names_the_setting_when_the_disk_is_full(tmp_path: Path) -> None:
    def full(temporary: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError) as caught:
        make_once(tmp_path / "a", full, setting="data.cache_dir")
    assert str(caught.value) == (
        f"{tmp_path / 'a'}: cannot be written: No space left on device. "
        "Free disk space or change data.cache_dir."
    )


def _make_slowly(folder: str, name: str) -> None:
    def make(temporary: Path) -> None:
        (Path(folder) / f"{name}.started").touch()
        time.sleep(0.5)
        temporary.write_text(name, encoding="utf-8")

    def waits() -> None:
        (Path(folder) / f"{name}.waited").touch()

    make_once(Path(folder) / "a", make, setting="x", on_wait=waits)


@pytest.mark.slow
def test_two_processes_make_a_file_once_and_the_second_waits(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_make_slowly, args=(str(tmp_path), name)) for name in ("p", "q")
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    maker = (tmp_path / "a").read_text()
    other = {"p": "q", "q": "p"}[maker]
    assert names(tmp_path) == sorted(["a", f"{maker}.started", f"{other}.waited"])


def test_a_lock_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(Killed), locked(tmp_path / "a", "x"):
        raise Killed
    with locked(tmp_path / "a", "x", on_wait=die):
        pass


def test_a_lock_leaves_no_file_and_no_empty_folder(tmp_path: Path) -> None:
    """Also if the work fails; a folder that has something, or was there before, stays."""
    with pytest.raises(Killed), locked(tmp_path / "a" / "b" / "x.bin", "data.cache_dir"):
        die()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a" / "x.bin", "data.cache_dir"):
        (tmp_path / "a" / "x.bin").write_text("")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.bin"]
    (tmp_path / "c").mkdir()
    with locked(tmp_path / "c" / "x.bin", "data.cache_dir"):
        pass
    assert (tmp_path / "c").is_dir()


def hold(path: Path, number: int, times: list[float]) -> None:
    """Hold the lock on `path` for a moment, and note when."""
    with locked(path, "--out"):
        begin = time.monotonic()
        time.sleep(0.02)
        times += [begin, time.monotonic()]


@pytest.mark.slow
def test_only_one_at_a_time_holds_a_lock_whose_file_is_removed(tmp_path: Path) -> None:
    """A waiting one must not get the removed file while another makes a new one; nor miss the folder."""
    with multiprocessing.Manager() as manager:
        times = [manager.list() for _ in range(4)]
        path = tmp_path / "new" / "x.bin"
        workers = [
            multiprocessing.get_context("fork").Process(target=hold, args=(path, i, times[i]))
            for i in range(4)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(30)
        assert [worker.exitcode for worker in workers] == [0] * 4
        spans = sorted(tuple(span) for span in times)
    assert all(before[1] <= after[0] for before, after in zip(spans, spans[1:], strict=False))
    # one that began to wait keeps the folder
    assert [file.name for folder in tmp_path.iterdir() for file in folder.iterdir()] == []


def test_a_refused_write_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(Killed), atomic_path(tmp_path / "new" / "deep" / "a.txt"):
        die()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_lock_in_a_folder_that_takes_no_files_is_an_error() -> None:
    """K7: filelock reports a held lock, so that waiting for it never ended."""
    found = "^/proc: cannot be written: No such file or directory. Change --out"
    with pytest.raises(UserError, match=found), locked(Path("/proc/x"), "--out"):
        pass
