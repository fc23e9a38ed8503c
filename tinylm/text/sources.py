"""Where documents come from: files on this machine, or a dataset on the Hugging Face hub.

    name ─▶ LocalFiles  .txt, .jsonl, .parquet (also .txt.gz, .jsonl.gz), a folder or a glob of them
         ─▶ HubDataset  downloaded whole, or streamed

Both give their documents (`str`) in a fixed order, and a fingerprint of their content. Which
documents are held out is decided in splits.py; what the data of a run are, in data_source.py.
"""

import glob
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from tinylm.common.errors import UserError, first_line, looked_in, not_found, reading, reason
from tinylm.common.files import open_regular, require_regular
from tinylm.common.hub import hub_errors, hub_problem, is_hub_name, require_hub
from tinylm.text.documents import (
    DAMAGED,
    RESUMES,
    ROW_ONLY_FILES,
    ROWS_ARE_FOR,
    SeparatorSeen,
    SpanChunk,
    TextChunk,
    end_of_document,
    field_texts,
    file_documents,
    import_optional,
    no_column,
    require_optional,
    spans_of,
    text_chunks,
)

# The suffixes of the files that are read for one purpose.
Kinds = tuple[str, ...]
DOCUMENT_FILES: Kinds = (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz")
BIN, NPY, DATATROVE = ".bin", ".npy", ".ds"
# Files of a source that are looked at before the work starts: opening each of many takes minutes.
CHECKED_FILES = 100
# Only opening such a file shows whether it is one.
TOKEN_FILES = (BIN, NPY, DATATROVE)


@dataclass(frozen=True)
class LocalFiles:
    """Document files on this machine, in the order in which they are read."""

    name: str
    paths: tuple[Path, ...]
    field: str
    separator: str | None

    def check(self) -> None:
        """Raise a UserError if one of the first files is not what its name says,
        or cannot be read for want of a package.
        """
        for path in self.paths[:CHECKED_FILES]:
            require_regular(path)
            if path.name.endswith(".parquet"):
                require_optional("pyarrow", path)

    def documents(self) -> Iterator[str]:
        """Every document that is not blank."""
        for path in self.paths:
            yield from file_documents(path, self.field, self.separator)

    def chunks(self) -> Iterator[SpanChunk | TextChunk]:
        """The documents in chunks that depend on the files alone;
        an error in reading them is in the last one.
        """
        try:
            for path in self.paths:
                require_regular(path)
                end = end_of_document(path, self.separator)
                if end is not None:
                    for span in spans_of(path, end):
                        yield SpanChunk(path, self.field, self.separator, span)
                else:
                    found = SeparatorSeen()
                    texts = file_documents(path, self.field, self.separator, found=found)
                    yield from text_chunks(texts, found)
        except UserError as error:
            yield TextChunk([], error)

    def size(self) -> int:
        """Bytes of all chunks; 0 if a file must be read to know."""
        size = 0
        for path in self.paths:
            if end_of_document(path, self.separator) is None:
                return 0
            size += os.path.getsize(path) if os.path.exists(path) else 0
        return size

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the kinds and contents of the files, read in blocks."""
        digest = hashlib.sha256()
        for path in self.paths:
            require_regular(path)
            with reading(path), open_regular(path) as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
                suffix = next((kind for kind in DOCUMENT_FILES if path.name.endswith(kind)), None)
                digest.update(f"{suffix} {content}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the Hugging Face hub, downloaded whole or streamed."""

    name: str
    config: str | None
    split: str
    streaming: bool
    field: str | None
    """the column of the text; None: rows are read, with all their columns"""
    again: str = RESUMES
    """the fix of an error if the network fails"""
    setting: str = "data.dataset"
    """the setting or flag that names the dataset"""

    def check(self) -> None:
        """Raise a UserError if the library of the hub is not installed; the hub is not asked."""
        require_optional("datasets", self.name)

    def documents(self) -> Iterator[str]:
        """Every document that is not blank, in the order of the dataset."""
        if self.field is None:
            raise ValueError("the dataset was opened for its rows, not for the text of one column")
        return field_texts(self.rows(), self.field)

    def chunks(self) -> Iterator[TextChunk]:
        """The documents in chunks; an error in reading them is in the last one."""
        return text_chunks(self.documents())

    def size(self) -> int:
        """0: the dataset must be read to know."""
        return 0

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the name: the content is not downloaded for it."""
        return hashlib.sha256(f"hub {self.name} {self.config} {self.split}".encode()).hexdigest()

    def rows(self) -> Iterator[tuple[str, Any]]:
        """Each row, with its location for errors."""
        dataset = self._load()
        where = f"{self.name} ({self.split})"
        try:
            for number, row in enumerate(dataset, start=1):
                yield f"{where}: row {number}", row
        except hub_errors() as error:
            problem = f"reading stopped: {first_line(error)}"
            raise UserError(where, problem, self.again) from error
        except DAMAGED as error:
            problem = f"one of its files is damaged: {first_line(error)}"
            raise UserError(where, problem, "Give another dataset, or local files") from error

    def _load(self) -> Iterable[Any]:
        """The dataset of the library; only its text column
        if the columns are known before reading.
        """
        where = (self.setting, self.name)
        fix = f"Give a local file or folder as {self.setting}"
        require_hub(where, fix)
        datasets = import_optional("datasets", self.name)
        try:
            dataset = datasets.load_dataset(
                self.name, self.config, split=self.split, streaming=self.streaming
            )
        except (*hub_errors(), *DAMAGED, datasets.exceptions.DatasetsError) as error:
            fix = f"Check {{}} and {{}}, or: {fix}"
            settings = ("data.dataset_config", "data.split")
            raise UserError(where, hub_problem(error), fix, *settings) from error
        columns = dataset.column_names
        if columns is None or self.field is None:
            return dataset
        if self.field not in columns:
            raise no_column(f"{self.name} ({self.split})", self.field, columns)
        return dataset.select_columns([self.field])


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


TextSource = LocalFiles | HubDataset | Together


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


def find_files(name: str, setting: str, kinds: Kinds) -> tuple[Path, ...]:
    """The files of these kinds that `name`, a path or glob, refers to, sorted;
    folders are searched recursively.
    """
    wanted = f"{'documents' if kinds is DOCUMENT_FILES else 'rows'} ({', '.join(kinds)})"
    if os.path.isdir(name):
        found = files_in(name, kinds)
        where = "in this folder"
    elif os.path.lexists(name):
        require_regular(Path(name))
        if not name.endswith(kinds):
            problem = f"not a kind of file with {wanted}"
            fix = "Convert it, or name it by its kind"
            raise UserError((setting, name), problem, _fix_for_rows(fix, name, kinds))
        return (Path(name),)
    else:
        matches = glob.glob(name, recursive=True)
        found = [Path(path) for path in matches if path.endswith(kinds) and not os.path.isdir(path)]
        where = f"matches{looked_in(name)}"
    if not found:
        problem = f"no file of a kind with {wanted} {where}"
        raise UserError(
            (setting, name), problem, _fix_for_rows("Give the path of one", name, kinds)
        )
    return tuple(sorted(found))


def _fix_for_rows(fix: str, name: str, kinds: Kinds) -> str:
    """`fix`, and for a file or folder of rows where documents are asked for, what reads them."""
    has_rows = name.endswith(ROW_ONLY_FILES)
    if os.path.isdir(name):
        has_rows = bool(files_in(name, ROW_ONLY_FILES))
    return f"{fix}. {ROWS_ARE_FOR}" if kinds is DOCUMENT_FILES and has_rows else fix


def files_in(folder: str, kinds: Kinds) -> list[Path]:
    """The files of these kinds in a folder and all folders in it, except hidden ones."""
    found = []
    for inner, _, names in os.walk(folder, onerror=_refuse_folder):
        hidden = any(part.startswith(".") for part in Path(inner).relative_to(folder).parts)
        for name in names:
            if not hidden and not name.startswith(".") and name.endswith(kinds):
                found.append(Path(inner, name))
    return found


def _refuse_folder(error: OSError) -> NoReturn:
    raise UserError(error.filename, reason(error), "Give a folder that can be read")
