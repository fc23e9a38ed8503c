"""How many validation documents are training documents too.

    DataSource, token file ─▶ `split_overlap` ─▶ by their text, or by their tokens ─▶ `count_overlap`

Text that is held out is divided by its content (sources.py), so it has none; token files that are
cut, and data.val_dataset, may have some.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tinylm.text.data_source import DataSource
from tinylm.text.sources import LocalFiles, Split
from tinylm.tokens.token_file import TokenFile

# Documents whose digests are computed together.
DIGESTS = 2**16
SourceFiles = Sequence[tuple[DataSource, TokenFile | None]]
"""the sources of a split with their token files; None for a stream"""


class Overlap(NamedTuple):
    """The documents of validation that are training documents too."""

    found: int
    """different documents that are in both splits"""
    of: int
    """different documents of validation"""
    repeated: int
    """documents of validation that are in both splits, each as often as it occurs"""


def count_overlap(train: Iterable[bytes], val: Iterable[bytes]) -> Overlap:
    """Count the documents that both splits have; memory holds 8 bytes for each validation document.

    Args:
        train: the content of each training document.
        val: the content of each validation document.

    >>> count_overlap([b"a", b"b", b"b"], [b"b", b"c", b"b"])
    Overlap(found=1, of=2, repeated=2)
    """
    wanted, counts = np.unique(
        np.concatenate([np.empty(0, "<u8"), *_digests(val)]), return_counts=True
    )
    found = np.zeros(len(wanted), dtype=bool)
    if len(wanted):
        for digests in _digests(train):
            # After the last one searchsorted gives len(wanted): any other place, where it is not.
            places = np.searchsorted(wanted, digests) % len(wanted)
            found[places[wanted[places] == digests]] = True
    return Overlap(int(found.sum()), len(wanted), int(counts[found].sum()))


def _digests(contents: Iterable[bytes]) -> Iterator[np.ndarray]:
    """A hash of each content, (n,) uint64, many at a time."""
    digests = bytearray()
    for content in contents:
        digests += hashlib.blake2b(content, digest_size=8).digest()
        if len(digests) == 8 * DIGESTS:
            yield np.frombuffer(bytes(digests), dtype="<u8")
            digests.clear()
    yield np.frombuffer(bytes(digests), dtype="<u8")


# --- the splits of a run ---


def split_overlap(train: SourceFiles, val: SourceFiles) -> Overlap:
    """How many documents of validation are training documents too, as far as it is known.

    Text is compared with text (`text_overlap`), and the token files of the settings
    with each other.
    """
    given = [file for source, file in train if source.split is None and file is not None]
    val_given = [file for source, file in val if source.split is None and file is not None]
    if given and val_given:
        return token_overlap(given, val_given)
    return text_overlap([source for source, _ in train], [source for source, _ in val])


def token_overlap(train: Sequence[TokenFile], val: Sequence[TokenFile]) -> Overlap:
    """How many documents of token files of one tokenizer are in both splits, by their tokens."""
    dtype = np.result_type(*(file.tokens.dtype for file in (*train, *val)))
    train_documents = (document for file in train for document in file.documents(dtype))
    val_documents = (document for file in val for document in file.documents(dtype))
    return count_overlap(train_documents, val_documents)


def text_overlap(train: Sequence[DataSource], val: Sequence[DataSource]) -> Overlap:
    """How many documents of data.val_dataset are training documents too;
    only text on this machine is compared.
    """
    train_splits = _local_texts(train)
    val_splits = _local_texts(val)
    if not train_splits or not val_splits:
        return Overlap(0, 0, 0)
    texts = (text.encode() for split in train_splits for text in split.documents())
    val_texts = (text.encode() for split in val_splits for text in split.documents())
    return count_overlap(texts, val_texts)


def _local_texts(sources: Iterable[DataSource]) -> list[Split]:
    splits = [source.split for source in sources if source.split is not None]
    return [split for split in splits if isinstance(split.text_source, LocalFiles)]
