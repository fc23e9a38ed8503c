"""How files are read and written.

Reading: a regular file whose content is of the kind that its name says; a pipe or a device would
have no end.

    `open_regular`, `read_regular`, or `require_regular` for a file that another library opens
    `mismatch`: a name and the first bytes ─▶ None, or what the file is and how to correct that

Writing: files exist whole or not at all, also after a kill or a power cut.

    a small file, replaced at once           `write_atomic`
    a large file or a folder, step by step   `atomic_path`, or `publish` for one that is made elsewhere
    a cache that several processes may want  `make_once`, or `locked` around work that is not one
    file

Every one of them writes beside the final name, syncs, renames and syncs the folder: a reader sees
the old content or the new one, never a part.
"""

import errno
import gzip
import os
import re
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from filelock import FileLock, Timeout

from tinylm.common.errors import UserError, read_error, write_error
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


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Turn errors of the operating system and of gzip while `path` is read into UserErrors
    that name it.
    """
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problem = f"damaged or truncated gzip data ({error})"
        raise UserError(path, problem, "Download or compress it again") from None
    except OSError as error:
        raise read_error(path, error) from None


def _unreadable(path: object, error: OSError | ValueError) -> UserError:
    if isinstance(error, OSError):
        return read_error(path, error)
    return UserError(path, error, "Give the path of a file that can be read")


def _irregular(path: object) -> UserError:
    return UserError(path, "not a regular file", "Give the path of a file on disk")


# --- what the first bytes of a file show it to be, whatever its name is ---
#
# A download can end as the page of an error or as a Git LFS pointer, and a compressed file can lose
# the end of its name. Decoded as text, such a file would give an error about its text, or be
# trained on.

START_BYTES = 128
"""of a file are enough for `mismatch`"""


class Content(NamedTuple):
    """A kind of content that is known by its first bytes."""

    what: str
    starts: tuple[bytes, ...]
    fix: str
    """`{name}` is the name of the file, `{stem}` the name without its last suffix"""
    suffixes: tuple[str, ...] = ()
    """the names of files that may have it end with these"""


# A corpus may consist of pages.
_PAGES = (".txt", ".html", ".htm")
_PAGE_FIX = "Download it again: the server sent a page in place of the file"
TEXTS = (
    Content(
        "a Git LFS pointer, not the file itself", (b"version https://git-lfs",), "Run: git lfs pull"
    ),
    Content("an HTML page", (b"<!doctype html", b"<html"), _PAGE_FIX, _PAGES),
    Content("an XML document", (b"<?xml",), _PAGE_FIX, _PAGES),
)
# Data may be compressed, whatever the end of their name: text/compression.py decompresses them.
COMPRESSED_ENDS = (".gz", ".bz2", ".xz", ".zst")
_DATA = (".txt", ".md", ".html", ".htm", ".csv", ".tsv", ".jsonl", *COMPRESSED_ENDS)
# The first bytes of compressed data, longer than those below: text may begin with BZh. zstd data
# can begin with a frame to skip.
COMPRESSED = re.compile(
    rb"(?P<gzip>\x1f\x8b\x08)|(?P<bzip2>BZh[1-9](1AY&SY|\x17rE8P\x90))|(?P<xz>\xfd7zXZ\0)"
    rb"|(?P<zstd>\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)"
)
BINARIES = (
    Content("parquet", (b"PAR1",), "Rename it to {stem}.parquet", (".parquet",)),
    Content("a zip archive", (b"PK\x03\x04",), "Unpack it: unzip {name}", (".ckpt", ".npz", ".pt")),
    Content("GGUF", (b"GGUF",), "Give a Hugging Face folder with safetensors", (".gguf",)),
    Content("a NumPy array", (b"\x93NUMPY",), "Rename it to {stem}.npy", (".npy",)),
    Content("a 7z archive", (b"7z\xbc\xaf\x27\x1c",), "Unpack it"),
    Content("a PDF", (b"%PDF-",), "Extract its text"),
    Content("an SQLite database", (b"SQLite format 3\0",), "Export its text"),
    Content("an Arrow file", (b"ARROW1\0\0",), "Write it as parquet"),
    Content("xz data", (b"\xfd7zXZ\0",), "Rename it to {name}.xz, or decompress it", _DATA),
)
# Numbers can begin with these bytes as well, so they are no sign in a file of numbers.
SHORT = (
    Content("gzip data", (b"\x1f\x8b",), "Rename it to {name}.gz, or decompress it", _DATA),
    Content("bzip2 data", (b"BZh",), "Rename it to {name}.bz2, or decompress it", _DATA),
    Content(
        "zstd data", (b"\x28\xb5\x2f\xfd",), "Rename it to {name}.zst, or decompress it", _DATA
    ),
    Content("UTF-32 text", (b"\xff\xfe\0\0", b"\0\0\xfe\xff"), "Save it as UTF-8"),
    Content("UTF-16 text", (b"\xff\xfe", b"\xfe\xff"), "Save it as UTF-8"),
)
NUMBERS = (".bin", ".npy", ".safetensors", ".ckpt", ".model")
# Files of these names have one kind of content.
REQUIRED = {".parquet": "parquet"}
_CONTROL = frozenset(range(32)) - frozenset(b"\t\n\f\r\x1b")


def mismatch(name: str, start: bytes) -> tuple[str, str] | None:
    """What a file is that its name does not say, and how to correct that; None if nothing is found.

    Args:
        name: the name of the file.
        start: its first `START_BYTES`.

    >>> mismatch("a.jsonl", b"PAR1\\x15\\x04")
    ('its content is parquet', 'Rename it to a.parquet')
    >>> mismatch("a.txt", b"PAR1 is how a parquet file begins")
    >>> mismatch("a.parquet", b'{"text": ""}')
    ('its content is not parquet', 'Download it again')
    """
    name_end = name.lower()
    if _is_text(start):
        known = TEXTS
        start = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    elif name_end.endswith(NUMBERS):
        known = BINARIES
    else:
        known = (*BINARIES, *SHORT)
    found = next((content for content in known if start.startswith(content.starts)), None)
    if found is not None and not name_end.endswith(found.suffixes or ("\0",)):
        stem = name.rpartition(".")[0] or name
        return f"its content is {found.what}", found.fix.format(name=name, stem=stem)
    for suffix, what in REQUIRED.items():
        if start and name_end.endswith(suffix) and (found is None or found.what != what):
            return f"its content is not {what}", "Download it again"
    return None


def _is_text(start: bytes) -> bool:
    """Whether the bytes are the beginning of UTF-8 text; its last character may be cut."""
    if not _CONTROL.isdisjoint(start):
        return False
    try:
        start.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True


# --- writing ---

# A lock is tried again if its folder disappears; more often than any number of processes needs.
LOCK_ATTEMPTS = 100


@contextmanager
def writing(path: object, setting: str) -> Iterator[None]:
    """Turn an operating system's refusal to write `path` into a UserError
    that names the setting it comes from.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None and type(error) is not OSError:  # for example a failed download
            raise
        raise write_error(path, setting, error) from error


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
    temporary = path.with_name(f".{path.name}.tmp")
    with made_folder(path.parent):
        remove(temporary)  # left by a process that was killed
        try:
            yield temporary
            publish(temporary, path)
        except BaseException:
            with suppress(OSError):  # must not hide the error that ended the block
                remove(temporary)
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
    with ExitStack() as folders:
        with writing(path.parent, setting):
            for left in reversed(range(LOCK_ATTEMPTS)):
                folders.enter_context(made_folder(path.parent))
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
            # While it is held: a process that waits for it notices, and locks a new file. An
            # OSError: it was removed before, or this is Windows, which does not remove an open file.
            with suppress(OSError):
                if os.path.samestat(path.stat(), held):
                    path.unlink()
            lock.release()


def _acquire(lock: FileLock, timeout: float, on_wait: Callable[[], object] | None) -> None:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        # filelock also says this of a folder in which no file can be created, such as /proc
        if not os.path.lexists(lock.lock_file):
            why = os.strerror(errno.ENOENT)
            raise FileNotFoundError(errno.ENOENT, why, lock.lock_file) from None
        if on_wait is not None:
            on_wait()
        lock.acquire(timeout=timeout)


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Create `folder`; at the end, each folder that did not exist before is removed if it is empty."""
    made = [part for part in (folder, *folder.parents) if not os.path.lexists(part)]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for part in made:  # the innermost first
            with suppress(OSError):  # it is not empty, or another process removed it
                part.rmdir()


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
    with writing(path, setting), made_folder(path.parent):
        Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)).rmdir()
