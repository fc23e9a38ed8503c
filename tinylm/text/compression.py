"""Compressed data files, as what they contain: gzip, bzip2, xz, zstd, each read block by block.

    first bytes ─▶ the name of a compression (`COMPRESSED` in common/files.py) ─▶ `OPENERS`

The content decides, not the name of the file. A file that expands without end (a "zip bomb") is an
error: memory and time are bounded by `MAX_RATIO`.
"""

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from tinylm.common.errors import UserError, first_line, import_optional

# Text is compressed to a third or a tenth, logs and repeated markup to a hundredth.
MAX_RATIO = 500
# The ratio is looked at after this many bytes: a small file may be anything.
FREE_BYTES = 2**26


def _zstd(file: BinaryIO) -> Any:
    """By pyarrow, which `datasets` installs: Python has zstd from 3.14 on."""
    pyarrow = import_optional("pyarrow", file.name)
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")


OPENERS: dict[str, Callable[[Any], Any]] = {
    "gzip": gzip.GzipFile,
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "zstd": _zstd,
}


def decompressed(path: Path, file: BinaryIO, compression: str) -> BinaryIO:
    """The content of a compressed file, to read from its start to its end.

    Args:
        path: its name, for errors.
        file: the file, open at its start; it is closed with the result.
        compression: a key of `OPENERS`.
    """
    opener = OPENERS[compression]
    named = {"fileobj": file} if opener is gzip.GzipFile else {}
    inner = opener(**named) if named else opener(file)
    return io.BufferedReader(_Expanding(path, file, inner, compression), 2**16)


class _Expanding(io.RawIOBase):
    """The bytes that a decompressor gives; its errors name the file, and their number is bounded."""

    def __init__(self, path: Path, file: BinaryIO, inner: Any, compression: str):
        self._path, self._file, self._inner = path, file, inner
        self._compression = compression
        self._size = os.fstat(file.fileno()).st_size
        self._n_read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as the content reaches; 0 at its end.

        Raises:
            UserError: the data are damaged, or expand to more than `MAX_RATIO` times their size.
        """
        try:
            block = self._inner.read(len(buffer))
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
            problem = f"damaged or truncated {self._compression} data ({first_line(error)})"
            raise UserError(self._path, problem, "Download or compress it again") from None
        self._n_read += len(block)
        if self._n_read > max(FREE_BYTES, MAX_RATIO * self._size):
            problem = (
                f"{self._size:,} bytes of {self._compression} data expand to more than "
                f"{MAX_RATIO} times as many, which text does not"
            )
            raise UserError(self._path, problem, "Remove it, or decompress it and look at it")
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        """Close the decompressor and the file under it."""
        if not self.closed:
            self._inner.close()
            self._file.close()
        super().close()
