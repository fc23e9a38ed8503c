"""The sources that a command's --data names, several as one."""

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from tinylm.common.errors import UserError, not_found
from tinylm.common.hub import is_hub_name
from tinylm.text.documents import SpanChunk, TextChunk
from tinylm.text.hub_dataset import HubDataset
from tinylm.text.sources import DOCUMENT_FILES, LocalFiles, find_files


@dataclass(frozen=True)
class Together:
    """Several sources, one after the other."""

    sources: tuple[LocalFiles | HubDataset, ...]

    @property
    def name(self) -> str:
        return " ".join(source.name for source in self.sources)

    def documents(self) -> Iterator[str]:
        """Every document that is not blank."""
        return chain.from_iterable(source.documents() for source in self.sources)

    def chunks(self) -> Iterator[SpanChunk | TextChunk]:
        """The documents in chunks; the first error is to end the reading."""
        return chain.from_iterable(source.chunks() for source in self.sources)

    def size(self) -> int:
        """Bytes of all chunks; 0 if a source must be read to know."""
        sizes = [source.size() for source in self.sources]
        return sum(sizes) if all(sizes) else 0

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the fingerprints of the sources."""
        return hashlib.sha256(
            "\n".join(source.fingerprint for source in self.sources).encode()
        ).hexdigest()


def sources_named(
    names: Sequence[str],
    field: str = "text",
    separator: str | None = None,
    *,
    again: str = "Try again",
) -> Together:
    """The sources of a command's --data: local files, or hf:owner/name[:config[:split]],
    a dataset that is streamed.

    Args:
        names: the arguments.
        field: column or key of the text.
        separator: divides the documents of a .txt file; None: each line is one.
        again: the fix of an error if the network fails.

    Raises:
        UserError: nothing is there, or nothing there is a document file.
    """
    return Together(tuple(_source_named(name, field, separator, again) for name in names))


def _source_named(
    name: str, field: str, separator: str | None, again: str
) -> LocalFiles | HubDataset:
    where = ("--data", name)
    if name.startswith("hf:"):
        dataset, config, split, *rest = [*name.removeprefix("hf:").split(":"), "", "", ""]
        if any(rest) or "/" not in dataset or not is_hub_name(dataset):
            problem = "not the name of a dataset on the hub"
            forms = "hf:owner/name, hf:owner/name:config or hf:owner/name:config:split"
            raise UserError(where, problem, f"Write {forms}")
        return HubDataset(
            dataset, config or None, split or "train", True, field, again, setting="--data"
        )
    if not os.path.lexists(name) and not glob.has_magic(name):
        fix = "Give a file, a folder, a glob, or a dataset on the hub written hf:owner/name"
        raise UserError(where, not_found(name), fix)
    return LocalFiles(name, find_files(name, "--data", DOCUMENT_FILES), field, separator)
