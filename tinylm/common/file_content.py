"""What the first bytes of a file show it to be, whatever its name is: the only table of them.

    a name and the first bytes ─▶ `mismatch` ─▶ None, or what the file is and how to correct that

A download can end as the page of an error or as a Git LFS pointer, and a compressed file can lose
the end of its name. Decoded as text, such a file would give an error about its text, or be trained
on.
"""

from typing import NamedTuple

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
_PAGE_FIX = "Download it again: the server sent a page in place of the file"
TEXTS = (
    Content(
        "a Git LFS pointer, not the file itself", (b"version https://git-lfs",), "Run: git lfs pull"
    ),
    Content("an HTML page", (b"<!doctype html", b"<html"), _PAGE_FIX, (".txt",)),
    Content("an XML document", (b"<?xml",), _PAGE_FIX, (".txt",)),
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
    Content("xz data", (b"\xfd7zXZ\0",), "Decompress it: unxz {name}"),
)
# Numbers can begin with these bytes as well, so they are no sign in a file of numbers.
SHORT = (
    Content("gzip data", (b"\x1f\x8b",), "Rename it to {name}.gz, or decompress it", (".gz",)),
    Content("bzip2 data", (b"BZh",), "Decompress it: bunzip2 {name}"),
    Content("zstd data", (b"\x28\xb5\x2f\xfd",), "Decompress it: unzstd {name}"),
    Content("UTF-16 text", (b"\xff\xfe", b"\xfe\xff"), "Save it as UTF-8"),
)
NUMBERS = (".bin", ".npy", ".safetensors", ".ckpt", ".model")
# Files of these names have one kind of content.
REQUIRED = {".gz": "gzip data", ".parquet": "parquet"}
_CONTROL = frozenset(range(32)) - frozenset(b"\t\n\f\r\x1b")


def mismatch(name: str, start: bytes) -> tuple[str, str] | None:
    """What a file is that its name does not say, and how to correct that; None if nothing is found.

    Args:
        name: the name of the file.
        start: its first `START_BYTES`.

    >>> mismatch("a.jsonl", b"PAR1\\x15\\x04")
    ('its content is parquet', 'Rename it to a.parquet')
    >>> mismatch("a.txt", b"PAR1 is how a parquet file begins")
    >>> mismatch("a.jsonl.gz", b'{"text": ""}')
    ('its content is not gzip data', 'Rename it to a.jsonl, or download it again')
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
            fix = "Download it again"
            if suffix == ".gz":
                fix = f"Rename it to {name[: -len(suffix)]}, or download it again"
            return f"its content is not {what}", fix
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
