r"""Documents: where they come from, and which are held out.

    1. source     .txt, .jsonl, .parquet (also .txt.gz, .jsonl.gz), a folder or glob of them, or a Hugging Face dataset
                                                        ─▶ str, one a document, in a fixed order       `find_source`
                  plain files also in spans, none of which cuts a document                              `spans_of`
    2. split      training or validation, decided by the text of each document                          `train_documents`

Text is UTF-8. A byte-order mark at the start of a file is dropped, and \r\n ends a line as \n does; every other character
stays as it is, NUL and U+2028 too. Blank documents are skipped. A row that is no document is an error that names its
file, line and key. Memory holds one document (or one batch of a parquet file) at a time, never a whole source.

Everything that reads documents asks here; encode.py makes tokens of them, packing.py rows of those.
"""

import glob
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from tinylm.common.errors import UserError, first_line, printable, reading, reason, require_regular
from tinylm.common.hub import hub_errors, is_hub_name, require_hub
from tinylm.config.schema import DataConfig
from tinylm.text.documents import DAMAGED, RESUMES, _import, _no_column, _texts, file_documents

# What the names of files end in that can be read for one purpose.
Kinds = tuple[str, ...]
DOCUMENT_FILES: Kinds = (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz")


@dataclass(frozen=True)
class LocalFiles:
    """Document files on this machine, in the order they are read."""

    name: str
    paths: tuple[Path, ...]
    field: str
    separator: str | None

    def documents(self) -> Iterator[str]:
        """Every document that is not blank."""
        for path in self.paths:
            yield from file_documents(path, self.field, self.separator)

    def fingerprint(self) -> str:
        """SHA-256 over the kinds and contents of the files, read in blocks."""
        digest = hashlib.sha256()
        for path in self.paths:
            require_regular(path)
            with reading(path), open(path, "rb") as file:
                digest.update(
                    f"{_suffix(path.name, DOCUMENT_FILES)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode()
                )
        return digest.hexdigest()


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the Hugging Face hub, downloaded whole or streamed."""

    name: str
    config: str | None
    split: str
    streaming: bool
    field: str | None
    """the column that holds a document's text; None: rows are read, with all their columns"""
    again: str = RESUMES
    """what an error tells the user to do where the network fails"""

    def documents(self) -> Iterator[str]:
        """Every document that is not blank, in the order of the dataset."""
        if self.field is None:
            raise ValueError(
                "documents are read from one column, and this dataset was found for its rows"
            )
        return _texts(self.rows(), self.field)

    def fingerprint(self) -> str:
        """SHA-256 over the name: what the hub stores under it is not read."""
        return hashlib.sha256(f"hub {self.name} {self.config} {self.split}".encode()).hexdigest()

    def rows(self) -> Iterator[tuple[str, Any]]:
        """Each row, with the place that an error calls it by."""
        dataset = self._load()
        try:
            for number, row in enumerate(dataset, start=1):
                yield f"{self.name} ({self.split}): row {number}", row
        except hub_errors() as error:
            raise UserError(
                f"{self.name} ({self.split}): reading stopped: {first_line(error)}. {self.again}"
            ) from error
        except DAMAGED as error:
            raise UserError(
                f"{self.name} ({self.split}): a file of it is damaged: {first_line(error)}. Give another dataset, or local files."
            ) from error

    def _load(self) -> Iterable[Any]:
        """The library's dataset, with the text column alone where it says which columns there are."""
        mend = "Give a local file or folder as data.dataset."
        require_hub(f"data.dataset: {self.name}", mend)
        datasets = _import("datasets", self.name)
        try:
            dataset = datasets.load_dataset(
                self.name, self.config, split=self.split, streaming=self.streaming
            )
        except (*hub_errors(), *DAMAGED, datasets.exceptions.DatasetsError) as error:
            raise UserError(
                f"data.dataset: {self.name}: {first_line(error)}. Check data.dataset_config and data.split, or: {mend}"
            ) from error
        columns = dataset.column_names
        if columns is None or self.field is None:
            return dataset
        if self.field not in columns:
            raise UserError(f"{self.name} ({self.split}): {_no_column(self.field, columns)}")
        return dataset.select_columns([self.field])


@dataclass(frozen=True)
class Together:
    """Several sources, one behind the other."""

    sources: tuple[LocalFiles | HubDataset, ...]

    @property
    def name(self) -> str:
        return " ".join(source.name for source in self.sources)

    def documents(self) -> Iterator[str]:
        """Every document that is not blank."""
        return chain.from_iterable(source.documents() for source in self.sources)

    def fingerprint(self) -> str:
        """SHA-256 over the fingerprints of the sources."""
        return hashlib.sha256(
            "\n".join(source.fingerprint() for source in self.sources).encode()
        ).hexdigest()


Source = LocalFiles | HubDataset | Together


def sources_named(
    names: Sequence[str],
    field: str = "text",
    separator: str | None = None,
    *,
    again: str = "Try again.",
) -> Together:
    """What a command's --data means: files that are here, or hf:owner/name[:config[:split]], a dataset on the hub that is streamed.

    Args:
        names: what was given.
        field: column or key that holds a document's text.
        separator: what divides documents in a .txt file; None: each line is one.
        again: what an error tells the user to do where the network fails.

    Raises:
        UserError: nothing is there, or nothing there is a document file.
    """
    return Together(tuple(_source_named(name, field, separator, again) for name in names))


def _source_named(
    name: str, field: str, separator: str | None, again: str
) -> LocalFiles | HubDataset:
    if name.startswith("hf:"):
        dataset, config, split, *rest = [*name.removeprefix("hf:").split(":"), "", "", ""]
        if any(rest) or "/" not in dataset or not is_hub_name(dataset):
            raise UserError(
                f"--data: {printable(name)}: a dataset on the hub is written hf:owner/name, hf:owner/name:config or hf:owner/name:config:split."
            )
        return HubDataset(dataset, config or None, split or "train", True, field, again)
    if not os.path.lexists(name) and not glob.has_magic(name):
        raise UserError(
            f"--data: {printable(name)}: not found. Give a file, a folder, a glob, or a dataset on the hub written hf:owner/name."
        )
    return LocalFiles(name, _find_files(name, "--data", DOCUMENT_FILES), field, separator)


def find_source(
    data: DataConfig, key: str, name: str, split: str, kinds: Kinds = DOCUMENT_FILES
) -> LocalFiles | HubDataset:
    """What `name`, the value of the setting data.`key`, means: files of these kinds that are here, or else a dataset on the hub.

    data.dataset_config belongs to data.dataset: a val_dataset on the hub is read in its default configuration.

    Raises:
        UserError: it is a path and nothing is there, or nothing there is a document file.
    """
    if os.path.lexists(name) or glob.has_magic(name):
        if key == "dataset" and (
            data.dataset_config is not None or data.split != "train" or data.val_split is not None
        ):
            raise UserError(
                f"data.dataset: {printable(name)} is on this machine, where files have no splits. Take split, val_split and dataset_config out."
            )
        return LocalFiles(
            name, _find_files(name, f"data.{key}", kinds), data.text_field, data.document_separator
        )
    if (
        not is_hub_name(name)
        or "/" not in name
        or _suffix(name, kinds)
        or name.endswith((*TOKEN_FILES, ".json", ".csv"))
    ):
        raise UserError(
            f"data.{key}: {printable(name)}: not found. Give a file, a folder, a glob, or a Hugging Face name written owner/name."
        )
    field = data.text_field if kinds is DOCUMENT_FILES else None
    return HubDataset(
        name, data.dataset_config if key == "dataset" else None, split, data.streaming, field
    )


def _find_files(name: str, setting: str, kinds: Kinds) -> tuple[Path, ...]:
    """The files of these kinds that a path or glob, the value of `setting`, stands for, sorted; folders are searched to their bottom."""
    wanted = f"{'documents' if kinds is DOCUMENT_FILES else 'rows'} ({', '.join(kinds)})"
    if os.path.isdir(name):
        found, place = files_in(name, kinds), "in this folder"
    elif os.path.lexists(name):
        require_regular(Path(name))
        if not _suffix(name, kinds):
            raise UserError(
                f"{setting}: {printable(name)}: not a kind of file with {wanted}. Convert it, or name it by its kind."
            )
        return (Path(name),)
    else:
        found = [
            Path(path)
            for path in glob.glob(name, recursive=True)
            if _suffix(path, kinds) and not os.path.isdir(path)
        ]
        place = "matches"
    if not found:
        raise UserError(
            f"{setting}: {printable(name)}: no file of a kind with {wanted} {place}. Give the path of one."
        )
    return tuple(sorted(found))


def files_in(folder: str, kinds: Kinds) -> list[Path]:
    """The files of these kinds in a folder and all folders in it, hidden ones left out."""
    found = [
        Path(inner, file)
        for inner, _, files in os.walk(folder, onerror=_refuse_folder)
        for file in files
        if _suffix(file, kinds)
    ]
    return [
        path
        for path in found
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _refuse_folder(error: OSError) -> NoReturn:
    raise UserError(
        f"{printable(error.filename)}: {reason(error)}. Give a folder that can be read."
    )


def _suffix(name: str, kinds: Kinds) -> str | None:
    """Which of these kinds a file name ends in."""
    return next((suffix for suffix in kinds if name.endswith(suffix)), None)


BIN, NPY, DATATROVE = ".bin", ".npy", ".ds"
TOKEN_FILES = (BIN, NPY, DATATROVE)


def is_token_file(name: str) -> bool:
    """Whether a dataset's name is that of a token file; `TokenFile.open` says whether it is a good one."""
    return name.endswith(TOKEN_FILES)
