"""What a frozen model says of the data, computed once and kept in a file: the log-probabilities of
dpo.reference: cached, and those of distill.cached.

    depends_on ─▶ cache_path: the name of the file has a hash of all that its numbers depend on
               ─▶ cached_array: the array in the file, which is made first if there is none

So that training holds one model, not two, and computes one forward pass per batch, not two.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tinylm.common.errors import UserError
from tinylm.common.files import make_once, open_regular

_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_path(folder: str, name: str, depends_on: list[Any]) -> Path:
    """The file for an array: another one if anything that it depends on is another."""
    key = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:16]
    return Path(folder) / f"{name}-{key}.bin"


def cached_array(
    path: Path, shape: tuple[int, ...], dtype: Any, compute: Callable[[], Iterable[np.ndarray]]
) -> np.ndarray:
    """The array in the file `path`, mapped and not writable; if there is no such file, `compute`
    gives its parts along the first axis.

    Only one process computes it, others wait. The file is a SHA-256 digest and the array.

    Args:
        dtype: with the byte order, such as <f4.

    Raises:
        UserError: the file is damaged, or cannot be written.
    """

    def make(temporary: Path) -> None:
        digest = hashlib.sha256()
        with open(temporary, "wb") as file:
            file.write(bytes(_DIGEST_BYTES))
            for part in compute():
                content = part.astype(dtype).tobytes()
                digest.update(content)
                file.write(content)
            file.seek(0)
            file.write(digest.digest())

    make_once(path, make, setting="data.cache_dir")
    n_bytes = np.dtype(dtype).itemsize * int(np.prod(shape))
    with open_regular(path) as file:
        digest = file.read(_DIGEST_BYTES)
        is_whole = os.fstat(file.fileno()).st_size == _DIGEST_BYTES + n_bytes
        if not is_whole or hashlib.file_digest(file, "sha256").digest() != digest:
            problem = "the content does not match its checksum"
            raise UserError(path, problem, "Delete the file; it is computed again")
    return np.memmap(path, dtype, "r", offset=_DIGEST_BYTES, shape=shape)
