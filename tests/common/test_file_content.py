"""Contents that are not what the name of the file says."""

import gzip
import io
import lzma
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tinylm.common.errors import UserError
from tinylm.common.files import START_BYTES, mismatch, open_regular, require_regular

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
PAGE = b"\n<!DOCTYPE html><html><body>404</body></html>"
GZIP = gzip.compress(b"text", mtime=0)


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("a.txt", "text")
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", GZIP, "its content is gzip data. Rename it to a.json.gz, or decompress it."),
        (
            "a.yaml",
            lzma.compress(b"text"),
            "its content is xz data. Rename it to a.yaml.xz, or dec",
        ),
        ("a.txt", LFS, "its content is a Git LFS pointer, not the file itself. Run: git lfs pull."),
        ("model.safetensors", LFS, "its content is a Git LFS pointer, not the file itself."),
        ("a.parquet", LFS, "its content is a Git LFS pointer, not the file itself."),
        ("a.txt.gz", PAGE, "its content is an HTML page. Download it again: the server sent"),
        ("config.json", PAGE, "its content is an HTML page."),
        ("a.jsonl", b"PAR1\x15\x04", "its content is parquet. Rename it to a.parquet."),
        ("a.json", archive(), "its content is a zip archive. Unpack it: unzip a.json."),
        ("a.parquet", archive(), "its content is a zip archive."),
        ("a.txt", "é\n".encode("utf-32"), "its content is UTF-32 text. Save it as UTF-8."),
        ("a.txt", "é\n".encode("utf-16"), "its content is UTF-16 text. Save it as UTF-8."),
        ("a.parquet", b"text", "its content is not parquet. Download it again."),
        (
            "a.json",
            b"BZh91AY&SY\x01",
            "its content is bzip2 data. Rename it to a.json.bz2, or decompress it.",
        ),
        ("c.yaml", b"\x89PDF", None),
        ("a.jsonl", GZIP, None),  # data are decompressed, whatever their name
        ("a.csv.gz", b"text", None),
        ("a.txt", PAGE, None),  # a corpus of pages
        ("a.html", PAGE, None),
        ("a.txt", b"PAR1, GGUF and BZh are names", None),
        ("a.txt", b"", None),
        ("a.gz", b"", None),
        ("a.txt", "é".encode() * START_BYTES + b"x", None),
        ("a.bin", b"\x1f\x8b\x08\x00", None),  # the tokens 35615 and 8
        ("m.safetensors", b"\x1f\x8b\0\0\0\0\0\0{}", None),  # a header of 35615 bytes
        ("a.ckpt", archive(), None),
        ("a.npz", archive(), None),
        ("a.txt.gz", GZIP, None),
        ("A.PARQUET", b"PAR1\x15\x04", None),
    ],
)
def test_a_file_is_compared_with_its_name(
    tmp_path: Path, name: str, content: bytes, message: str | None
) -> None:
    """By whatever opens it: the check is in the one function that all of them use."""
    path = tmp_path / name
    path.write_bytes(content)
    for check in (require_regular, open_regular):
        if message is None:
            found = check(path)
            if found is not None:
                found.close()
            continue
        with pytest.raises(UserError) as caught:
            check(path)
        assert str(caught.value).startswith(f"{path}: {message}")


def test_token_arrays_of_every_first_number_pass() -> None:
    """The first number of a file of tokens can be any; only text is known by two bytes."""
    for first in range(2**16):
        tokens = np.array([first, 7, 300, 65535, 0], dtype="<u2").tobytes()
        assert mismatch("train.bin", tokens) is None
