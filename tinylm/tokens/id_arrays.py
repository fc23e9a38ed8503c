"""Arrays of token ids that other programs wrote, read as token files;
and token files written as NumPy arrays.

    NAME.npy      np.save of one row of uint16 or uint32
    NAME.bin      bare numbers; data.token_dtype says their type; also under the name NAME.npy
    NAME.ds       datatrove's tokens, with NAME.ds.index and NAME.ds.metadata beside it

An array has no header: it is read once, whole, to check its ids and to find
where its documents end.
"""

import hashlib
import io
import os
import re
import tokenize
from pathlib import Path

import numpy as np

from tinylm.common.errors import UserError, first_line
from tinylm.common.files import atomic_path, open_regular, reading, require_regular, writing
from tinylm.text.sources import DATATROVE, NPY
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.token_file import BLOCK, ENCODE, END_BYTES, HEADER_BYTES, MAGIC, TokenFile
from tinylm.tokens.token_file_writer import finished_header

DATATROVE_AGAIN = "Run the task of datatrove again that wrote it"


def open_tokens(
    path: str | Path, *, tokenizer: Tokenizer, dtype: str | None = None, fix: str | None = None
) -> TokenFile:
    """Open a token file of ours, or an array of ids.

    Args:
        path: a token file, or an array: .npy, .ds, or bare.
        tokenizer: the tokenizer that an array was encoded with; its EOS closes the documents.
        dtype: type of the numbers of a bare array, `uint16` or `uint32`.
        fix: what an error tells the user to do; by default, to encode again.

    Raises:
        UserError: it is neither, or not complete,
            or an id of an array is not one of the tokenizer's.
    """
    path = Path(path)
    again = fix or f"Encode again: {ENCODE} {path}"
    require_regular(path)
    with reading(path), open_regular(path) as file:
        head = file.read(HEADER_BYTES)
        size = os.path.getsize(path)
    ends = None
    if path.suffix == NPY and (dtype is None or head.startswith(np.lib.format.MAGIC_PREFIX)):
        bare = "If it has bare ids without a header, set data.token_dtype to uint16 or uint32"
        layout = npy_layout(path, head, size, f"{again}. {bare}")
        _require_dtype(path, layout[0], dtype)
    elif path.suffix == DATATROVE:
        layout = _datatrove_layout(path, size)
        ends = _datatrove_ends(path)
    elif dtype is not None and not head.startswith(MAGIC):
        layout = _bare_layout(path, dtype, size)
    else:
        found = TokenFile.open(path, fix)
        _require_dtype(path, found.header.dtype, dtype)
        return found
    return _scan(path, *layout, tokenizer, again, ends)


def _require_dtype(path: Path, found: str, dtype: str | None) -> None:
    """Raise a UserError if data.token_dtype is set to another type than the header's."""
    if dtype is not None and found != dtype:
        raise UserError(
            "data.token_dtype",
            f"is {dtype}, but the header of {path} says {found}",
            "Remove data.token_dtype",
        )


def _scan(
    path: Path,
    dtype: str,
    offset: int,
    count: int,
    tokenizer: Tokenizer,
    fix: str,
    ends: np.ndarray | None,
) -> TokenFile:
    """An array of ids as a token file: read once, in blocks, for the content of header and index.

    Raises:
        UserError: an id is not one of the tokenizer's, or `ends` are not where documents end.
    """
    little_endian = np.dtype(dtype).newbyteorder("<")
    tokens = np.memmap(path, dtype=little_endian, mode="r", offset=offset, shape=(count,))
    digest = hashlib.sha256()
    text_bytes = 0
    byte_lengths = np.array(tokenizer.byte_lengths(), dtype=np.uint32)
    after_eos = []
    for start in range(0, count, BLOCK):
        block = tokens[start : start + BLOCK]
        if int(block.max()) >= tokenizer.vocab_size:
            place = start + int(np.argmax(block >= tokenizer.vocab_size))
            raise UserError(
                path,
                f"id {tokens[place]} at position {place}, and the tokenizer of this run has "
                f"{tokenizer.vocab_size} tokens",
                "Set tokenizer to the one that it was encoded with, or correct data.token_dtype",
            )
        digest.update(block.data)
        text_bytes += int(byte_lengths[block].sum(dtype=np.int64))
        after_eos.append(start + 1 + np.flatnonzero(block == tokenizer.eos_id))
    if ends is not None:
        _check_ends(path, ends, np.concatenate(after_eos), count)
    else:
        ends = np.concatenate([*after_eos, [count]]).astype("<u8")
        if len(ends) > 1 and ends[-2] == count:
            ends = ends[:-1]  # the last document is closed
    header = finished_header(
        tokenizer,
        digest,
        dtype=dtype,
        count=count,
        documents=len(ends),
        text_bytes=text_bytes,
        source="",
        recipe="",
    )
    return TokenFile(path, header, fix, offset=offset, ends=ends)


# --- the layouts: dtype, offset and number of ids -------------------------------------------------


def _bare_layout(path: Path, dtype: str, size: int) -> tuple[str, int, int]:
    """Of bare numbers."""
    itemsize = np.dtype(dtype).itemsize
    if not size or size % itemsize:
        problem = (
            f"expected a multiple of {itemsize} bytes (data.token_dtype is {dtype}), found {size}"
        )
        raise UserError(path, problem, "Give the whole file, or correct data.token_dtype")
    return dtype, 0, size // itemsize


def npy_layout(path: Path, head: bytes, size: int, fix: str) -> tuple[str, int, int]:
    """Of a NumPy file; anything but a plain array of ids is refused before it is read."""
    file = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(file)
        if version != (
            1,
            0,
        ):  # np.save writes later ones only for names and types that ids do not need
            raise ValueError(f"format {version[0]}.{version[1]}")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except (ValueError, SyntaxError, tokenize.TokenError, RecursionError) as error:
        problem = f"not a NumPy file of token ids: {first_line(error)[:200]}"
        raise UserError(path, problem, fix) from None
    if len(shape) != 1 or dtype not in (np.dtype("<u2"), np.dtype("<u4")):
        problem = f"expected one row of uint16 or uint32, found {dtype.str} of shape {shape}"
        raise UserError(path, problem, "Save the ids so with np.save")
    expected = file.tell() + shape[0] * dtype.itemsize
    if size != expected or not shape[0]:
        problem = (
            f"expected {expected} bytes for {shape[0]} ids of {dtype.name}, and at least one id, "
            f"found {size}"
        )
        raise UserError(path, problem, fix)
    return dtype.name, file.tell(), shape[0]


def _datatrove_layout(path: Path, size: int) -> tuple[str, int, int]:
    """Of datatrove's NAME.ds, from NAME.ds.metadata, after the name of the tokenizer."""
    metadata = _beside(path, ".metadata")
    with reading(metadata), open_regular(metadata) as file:
        head = file.read(HEADER_BYTES)
    fields = re.match(rb"[^\n]*\|([24])\n([1-9][0-9]{0,15})(\n|$)", head)
    if not fields:
        problem = f"expected a name, |2 or |4, then the number of tokens, found {head[:80]!r}"
        raise UserError(metadata, problem, DATATROVE_AGAIN)
    width, count = int(fields[1]), int(fields[2])
    if size != width * count:
        problem = f"expected {width * count} bytes ({count} tokens of {width} bytes), found {size}"
        raise UserError(path, problem, DATATROVE_AGAIN)
    return ("uint16" if width == 2 else "uint32"), 0, count


def _datatrove_ends(path: Path) -> np.ndarray:
    """Where each document ends, from NAME.ds.index."""
    index = _beside(path, ".index")
    size = os.path.getsize(index)
    if not size or size % END_BYTES:
        problem = f"expected {END_BYTES} bytes for each of at least one document, found {size}"
        raise UserError(index, problem, DATATROVE_AGAIN)
    return np.memmap(index, dtype="<u8", mode="r")


def _beside(path: Path, suffix: str) -> Path:
    beside = path.with_name(f"{path.name}{suffix}")
    if not os.path.lexists(beside):
        files = "datatrove writes .ds, .ds.index and .ds.metadata"
        raise UserError(beside, "not found", f"Keep it beside {path.name}: {files}")
    require_regular(beside)
    return beside


def _check_ends(path: Path, ends: np.ndarray, after_eos: np.ndarray, count: int) -> None:
    """UserError unless the documents of an index fill the file, and each ends after an EOS."""
    if ends[-1] != count or not ends[0] or (ends[:-1] >= ends[1:]).any():
        problem = f"its index is not that of {count} tokens in {len(ends)} documents"
        raise UserError(path, problem, DATATROVE_AGAIN)
    closed = np.isin(ends, after_eos.astype(ends.dtype), assume_unique=True)
    other = np.flatnonzero(~closed)
    if len(other):
        raise UserError(
            path,
            f"{len(other)} of {len(ends)} documents, the first of them number {other[0] + 1}, do "
            "not end with the tokenizer's end of text",
            "Set tokenizer to the one that encoded it, or encode with its eos_token and shuffle no "
            "chunks",
        )


# --- NumPy arrays of our token files --------------------------------------------------------------


def holds_ids(path: Path, file: TokenFile) -> bool:
    """Whether `path` has the ids of `file` and nothing else, as `write_ids` writes them.

    Raises:
        UserError: it is not an array of ids, or cannot be read.
    """
    require_regular(path)
    with reading(path), open_regular(path) as array:
        head = array.read(HEADER_BYTES)
        size = os.path.getsize(path)
    if path.suffix == NPY:
        dtype, offset, count = npy_layout(path, head, size, "Delete it")
    else:
        dtype, offset, count = file.header.dtype, 0, size // file.tokens.itemsize
    if (dtype, count) != (file.header.dtype, len(file)):
        return False
    ids = np.memmap(path, dtype=file.tokens.dtype, mode="r", offset=offset, shape=(count,))
    return all(
        np.array_equal(ids[start : start + BLOCK], file.tokens[start : start + BLOCK])
        for start in range(0, count, BLOCK)
    )


def write_ids(file: TokenFile, path: Path, setting: str) -> None:
    """Write the ids of `file` alone, whole or not at all; `setting` decides where. The name decides
    the form: .npy is a plain NumPy array, another one has bare numbers.
    """
    header = {
        "descr": file.tokens.dtype.str,
        "fortran_order": False,
        "shape": file.tokens.shape,
    }
    with writing(path, setting), atomic_path(path) as temporary, open(temporary, "wb") as out:
        if path.suffix == NPY:
            np.lib.format.write_array_header_1_0(out, header)
        for start in range(0, len(file), BLOCK):
            out.write(file.tokens[start : start + BLOCK].data)
