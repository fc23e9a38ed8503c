"""How files are read and written.

Reading: a regular file whose content is of the kind that its name says; a pipe or a device would
have no end.

    `open_regular`, `read_regular`, or `require_regular` for a file that another library opens

Writing: files exist whole or not at all, also after a kill or a power cut.

    a small file, replaced at once           `write_atomic`
    a large file or a folder, step by step   `atomic_path`, or `publish` for one that is made elsewhere
    a cache that several processes may want  `make_once`, or `locked` around work that is not one
    file

Every one of them writes beside the final name, syncs, renames and syncs the folder: a reader sees
the old content or the new one, never a part. Knows nothing of what is in the files.
"""

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from tinylm.common.errors import UserError, read_error, reading, writing
from tinylm.common.file_content import START_BYTES, mismatch
from tinylm.common.platform import sync

# --- reading ---


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """`path`, open to read its bytes: how this program opens every file that it reads.

    Raises:
        UserError: it cannot be opened, or is not a regular file: a pipe would wait for a writer
            forever, and a device may have no end.
    """
    require_regular(path)  # before it is opened, which alone affects some devices
    return open(path, "rb", opener=_open_regular)


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file; a UserError if it cannot be read, or as `open_regular`."""
    with reading(path), open_regular(path) as file:
        return file.read()


def _open_regular(path: str, flags: int) -> int:
    """`os.open`, which returns at once from a pipe and checks the file that it opened,
    because another one may have got its name since the first check.
    """
    if sys.platform != "win32":
        flags |= os.O_NONBLOCK
    try:
        handle = os.open(path, flags)
    except OSError as error:
        raise _unreadable(path, error) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _irregular(path)
    return handle


def require_regular(path: str | os.PathLike[str]) -> None:
    """Raise a UserError unless `path` is a regular file, not a pipe, a device or a circle of links,
    and its content is of a kind that its name allows. For files that another library opens;
    see `open_regular`.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise _unreadable(path, error) from None
    if not stat.S_ISREG(mode):
        raise _irregular(path)
    with reading(path), open(path, "rb", opener=_open_regular) as file:
        found = mismatch(os.path.basename(path), file.read(START_BYTES))
    if found is not None:
        raise UserError(path, *found)


def _unreadable(path: object, error: OSError | ValueError) -> UserError:
    if isinstance(error, OSError):
        return read_error(path, error)
    return UserError(path, error, "Give the path of a file that can be read")


def _irregular(path: object) -> UserError:
    return UserError(path, "not a regular file", "Give the path of a file on disk")


# --- writing ---

# A lock is tried again if its folder disappears; more often than any number of processes needs.
LOCK_ATTEMPTS = 100


def write_atomic(path: Path, content: str | bytes, setting: str) -> None:
    """Replace the file `path` by `content` (text as UTF-8, line ends as they are);
    missing folders are created.

    Raises:
        UserError: the file cannot be written; the message names `setting`,
            which the path comes from.
    """
    with writing(path, setting), atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file or folder at; it becomes `path` at the end of the block.

    If the block raises, what it wrote is removed, with the folders that were made for it, and the old
    `path` is unchanged. A file replaces
    the file `path`; a folder is created by the block (`temporary.mkdir()`) and cannot replace one
    that has content. Only one process may write `path` at a time, see `locked`.

        with writing(path, "data.cache_dir"), atomic_path(path) as temporary:
            np.save(temporary, ids)

    Raises:
        OSError: `path` cannot be written; `writing` around the block turns it into a UserError.
    """
    made = make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.tmp")
    remove(temporary)  # left by a process that was killed
    try:
        yield temporary
        publish(temporary, path)
    except BaseException:
        with suppress(OSError):  # must not hide the error that ended the block
            remove(temporary)
        remove_empty(made)
        raise


def publish(made: Path, path: Path) -> None:
    """Rename a finished file or folder to `path`, on the same file system,
    so that a power cut loses neither.
    """
    for part in sorted(made.rglob("*")) if made.is_dir() else ():
        sync(part)
    sync(made)
    os.replace(made, path)
    sync(path.parent)


def make_once(
    path: Path,
    make: Callable[[Path], object],
    *,
    setting: str,
    on_wait: Callable[[], object] | None = None,
) -> None:
    """Make the file or folder `path` unless it exists, whole or not at all,
    by one process while others wait.

        make_once(path, lambda temporary: temporary.write_bytes(compute()), setting="data.cache_dir")

    Args:
        path: its final place.
        make: called with a temporary path beside `path` to write the file at,
            or to create the folder at.
        setting: what decides where `path` is, for errors.
        on_wait: called before waiting for another process that is making it.

    Raises:
        UserError: `path` cannot be written.
    """
    with locked(path, setting, on_wait=on_wait), writing(path, setting):
        if not path.exists():
            with atomic_path(path) as temporary:
                make(temporary)


@contextmanager
def locked(
    path: Path,
    setting: str,
    *,
    timeout: float = -1,
    on_wait: Callable[[], object] | None = None,
) -> Iterator[None]:
    """Hold the lock on making `path`, for one process of this machine;
    it is released when the process dies.

    Args:
        path: the file or folder to be made; the lock is a file beside it, `.NAME.lock`.
        setting: what decides where `path` is, for errors.
        timeout: seconds to wait for another process that holds the lock; -1: forever.
        on_wait: called before waiting for another process that holds the lock.

    Raises:
        UserError: the folder of `path` cannot be written.
        Timeout: another process still holds the lock.
    """
    file = path.with_name(f".{path.name}.lock")
    with temporary_lock(file, setting, timeout=timeout, on_wait=on_wait):
        yield


@contextmanager
def temporary_lock(
    path: Path,
    setting: str,
    *,
    timeout: float = -1,
    on_wait: Callable[[], object] | None = None,
) -> Iterator[None]:
    """Hold the lock file `path`. At the end it is removed, and with it each folder
    that was made for it and is still empty.

    Args:
        path: the lock file.
        setting: what decides where it is, for errors.
        timeout: seconds to wait for another process that holds it; -1: forever.
        on_wait: called before waiting for another process that holds the lock.

    Raises:
        UserError: the folder of `path` cannot be written.
        Timeout: another process still holds the lock.
    """
    lock = FileLock(path)
    with writing(path.parent, setting):
        for left in reversed(range(LOCK_ATTEMPTS)):
            made = make_folder(path.parent)
            try:
                _acquire(lock, timeout, on_wait)
                break
            except FileNotFoundError:  # while this one waited, the folder was empty and removed
                if not left:
                    raise
        held = path.stat()
    try:
        yield
    finally:
        # While it is held: a process that waits for it notices, and locks a new file. An OSError:
        # it was removed before, or this is Windows, which does not remove an open file.
        with suppress(OSError):
            if os.path.samestat(path.stat(), held):
                path.unlink()
        lock.release()
        remove_empty(made)


def _acquire(lock: FileLock, timeout: float, on_wait: Callable[[], object] | None) -> None:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if on_wait is not None:
            on_wait()
        lock.acquire(timeout=timeout)


def make_folder(folder: Path) -> list[Path]:
    """Create `folder`; the folders that did not exist, the innermost first."""
    made = [part for part in (folder, *folder.parents) if not os.path.lexists(part)]
    folder.mkdir(parents=True, exist_ok=True)
    return made


def remove_empty(folders: list[Path]) -> None:
    """Remove the folders that are empty, the innermost first."""
    for folder in folders:
        with suppress(OSError):  # it is not empty, or another process removed it
            folder.rmdir()


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content; nothing happens if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def require_new(path: Path) -> None:
    """Raise a UserError if `path` exists, except as an empty folder: nothing is overwritten."""
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(path, "already exists", "Delete it, or choose another folder")


def require_writable(path: Path, setting: str) -> None:
    """Raise a UserError if `path` exists or cannot be created, which is tried,
    before the work that it is for.
    """
    require_new(path)
    with writing(path, setting):
        made = make_folder(path.parent)
        Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)).rmdir()
        remove_empty(made)
