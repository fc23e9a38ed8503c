"""Where documents come from, and which of them are for training or for validation.

    name ─▶ LocalFiles  files of `DOCUMENT_KINDS`, also compressed, a folder or a glob of them
         ─▶ HubDataset  downloaded whole, or streamed
    text ─▶ hash with the seed, as a number in [0, 1) ─▶ below val_fraction: validation, else training

Sources give their documents (`str`) in a fixed order, and a fingerprint of their content. A `Split`
has the training or the validation documents of a source. The text alone decides, so equal documents
are in the same split, and a stream needs no memory of the documents before. What the data of a run
are is in data_source.py.
"""

import glob
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import cache, cached_property
from pathlib import Path
from typing import Literal, NoReturn, Protocol, TypeVar

# text.pages is imported for a page
from tinylm import text
from tinylm.common.errors import UserError, looked_in, reason, require_optional
from tinylm.common.files import COMPRESSED_ENDS, open_regular, reading, require_regular
from tinylm.text.documents import (
    PAGES,
    WHOLE_FILES,
    SeparatorSeen,
    SpanChunk,
    TextChunk,
    end_of_document,
    file_documents,
    file_kind,
    spans_of,
    text_chunks,
)
from tinylm.text.row_text import DOCUMENTS_ARE_FOR, ROW_ONLY_FILES, ROWS_ARE_FOR

logger = logging.getLogger(__name__)

# The suffixes of the files that are read for one purpose.
Kinds = tuple[str, ...]
DOCUMENT_KINDS = (".txt", ".jsonl", ".parquet", ".json", ".csv", ".tsv", ".md", ".html", ".htm")
DOCUMENT_FILES: Kinds = tuple(
    kind + end
    for kind in DOCUMENT_KINDS
    for end in ("", *COMPRESSED_ENDS)
    if kind != ".parquet" or not end
)
BIN, NPY, DATATROVE = ".bin", ".npy", ".ds"
# Files of a source that are looked at before the work starts: opening each of many takes minutes.
CHECKED_FILES = 100
# Files that are named in a note; the others are counted.
MAX_NAMED_FILES = 3
# Only opening such a file shows whether it is one.
TOKEN_FILES = (BIN, NPY, DATATROVE)


@dataclass(frozen=True)
class LocalFiles:
    """Document files on this machine, in the order in which they are read."""

    name: str
    paths: tuple[Path, ...]
    field: str
    separator: str | None
    without_text: dict[Path, None] = dataclass_field(default_factory=dict, compare=False)
    """the files that would be one document and had no text when they were read, in their order"""

    def documents(self) -> Iterator[str]:
        """Every document that is not blank."""
        for path in self.paths:
            yield from self._documents_of(path)
        if self.without_text:
            self._log_without_text()

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
                    yield from text_chunks(self._documents_of(path, found), found)
            if self.without_text:
                self._log_without_text()
        except UserError as error:
            yield TextChunk([], error)

    def _documents_of(self, path: Path, found: SeparatorSeen | None = None) -> Iterator[str]:
        """The documents of one file; a file that would be one document and has no text is noted."""
        texts = file_documents(path, self.field, self.separator, found=found)
        if file_kind(path) not in WHOLE_FILES:
            return texts
        whole = list(texts)
        if not whole:
            self.without_text[path] = None
        return iter(whole)

    def _log_without_text(self) -> None:
        log_once(f"{self.name}: left out, without any text: {some_files(self.without_text)}")

    def size(self) -> int:
        """Bytes of all chunks; 0 if a file must be read to know."""
        size = 0
        for path in filter(os.path.exists, self.paths):
            if end_of_document(path, self.separator) is None:
                return 0
            size += os.path.getsize(path)
        return size

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the kinds and contents of the files, read in blocks; of pages also over the
        program that finds their text.
        """
        digest = hashlib.sha256()
        for path in self.paths:
            require_regular(path)
            with reading(path), open_regular(path) as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
                suffix = next((kind for kind in DOCUMENT_FILES if path.name.endswith(kind)), None)
                digest.update(f"{suffix} {content}\n".encode())
            if set(path.suffixes) & set(PAGES):
                digest.update(text.pages.extractor(path).encode())
        return digest.hexdigest()


class TextSource(Protocol):
    """Documents in a fixed order: `LocalFiles`, `HubDataset`, or several of them together."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """64 hex digits that identify the content."""

    def documents(self) -> Iterator[str]:
        """Every document that is not blank."""

    def chunks(self) -> Iterator[SpanChunk | TextChunk]:
        """The documents in chunks; an error in reading them is in the last one."""

    def size(self) -> int:
        """Bytes of all chunks; 0 if the source must be read to know."""


def find_files(name: str, setting: str, kinds: Kinds) -> tuple[Path, ...]:
    """The files of these kinds that `name`, a path or glob, refers to, sorted;
    folders are searched recursively.

    Raises:
        UserError: there are none, or one of the first is not what its name says, or cannot be read
            for want of a package.
    """
    what = "documents" if kinds is DOCUMENT_FILES else "rows"
    if os.path.isdir(name):
        found = files_in(name, kinds)
        _log_kinds(name, found)
        where = "in this folder"
    elif os.path.lexists(name):
        require_regular(Path(name))
        if not name.endswith(kinds):
            problem = f"not a kind of file with {what} ({list_kinds(kinds)})"
            fix = "Convert it, or name it by its kind"
            raise UserError((setting, name), problem, _fix_for_kinds(fix, name, kinds))
        found = [Path(name)]
        where = ""
    else:
        matches = glob.glob(name, recursive=True)
        found = [Path(path) for path in matches if path.endswith(kinds) and not os.path.isdir(path)]
        where = f"matches{looked_in(name)}"
    if not found:
        problem = f"no file of a kind with {what} ({list_kinds(kinds)}) {where}"
        raise UserError(
            (setting, name), problem, _fix_for_kinds("Give the path of one", name, kinds)
        )
    found.sort()
    for path in found[:CHECKED_FILES]:
        require_regular(path)
        if path.name.endswith(".parquet"):
            require_optional("pyarrow", path)
        if kinds is DOCUMENT_FILES and set(path.suffixes) & set(PAGES):
            require_optional("trafilatura", path, text.pages.TRAFILATURA)
    return tuple(found)


def _log_kinds(folder: str, found: list[Path]) -> None:
    """Log how many files of each kind a folder has, and those that are left out, if there are
    several kinds or any of those.
    """
    others = sorted(set(files_in(folder, ("",))) - set(found))
    counts = Counter(map(file_kind, found))
    if not found or (len(counts) == 1 and not others):
        return
    read = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
    left_out = f"; left out, of other kinds: {some_files(others)}" if others else ""
    log_once(f"{folder}: files: {read}{left_out}")


def some_files(paths: Iterable[Path]) -> str:
    """The number of files, and the first of their names.

    >>> some_files([Path("a/x.png"), Path("b.pdf")])
    '2 (x.png, b.pdf)'
    """
    names = [path.name for path in paths]
    more = ", ..." if len(names) > MAX_NAMED_FILES else ""
    return f"{len(names)} ({', '.join(names[:MAX_NAMED_FILES])}{more})"


@cache
def log_once(line: str) -> None:
    """Log a note that would be repeated for each split and each pass."""
    logger.info("%s", line)


def list_kinds(kinds: Kinds) -> str:
    """The kinds of files as a message lists them.

    >>> list_kinds((".txt", ".txt.gz", ".txt.xz", ".parquet"))
    '.txt, .parquet; also .gz, .xz'
    """
    plain = [kind for kind in kinds if not kind.endswith(COMPRESSED_ENDS)]
    ends = [end for end in COMPRESSED_ENDS if any(kind.endswith(end) for kind in kinds)]
    return "; also ".join(", ".join(names) for names in (plain, ends) if names)


def _fix_for_kinds(fix: str, name: str, kinds: Kinds) -> str:
    """`fix`, and for rows where documents are asked for, or the reverse, what reads them."""
    if kinds is not DOCUMENT_FILES:
        has_documents = name.endswith((*DOCUMENT_FILES, *TOKEN_FILES))
        return f"{fix}. {DOCUMENTS_ARE_FOR}" if has_documents else fix
    has_rows = name.endswith(ROW_ONLY_FILES)
    if os.path.isdir(name):
        has_rows = bool(files_in(name, ROW_ONLY_FILES))
    return f"{fix}. {ROWS_ARE_FOR}" if has_rows else fix


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


# --- training or validation ---

Which = Literal["train", "val"]
NAMES: dict[Which, str] = {"train": "training", "val": "validation"}
T = TypeVar("T")


@dataclass(frozen=True)
class Split:
    """The training or validation documents of a source."""

    which: Which
    text_source: TextSource
    held_out: tuple[float, int] | None
    """fraction and seed of the validation documents, if both splits come from this source"""
    limit: int | None
    """number of documents to read at most"""

    def documents(self) -> Iterator[str]:
        """The documents of the split.

        Raises:
            UserError: there are none.
        """
        return self.select(self.text_source.documents(), lambda text: text)

    def select(
        self, items: Iterable[T], text_of: Callable[[T], str], *, kind: str = "documents"
    ) -> Iterator[T]:
        """The items of the source, documents or rows, that are in the split by their text.

        Raises:
            UserError: there are none.
        """
        n_read = n_kept = 0
        for item in items:
            n_read += 1
            if self.has(text_of(item)):
                n_kept += 1
                yield item
                if n_kept == self.limit:
                    return
        if not n_kept:
            raise self.empty_error(n_read, kind)

    def has(self, text: str) -> bool:
        """Whether a document of the source is in this split, without regard to the limit."""
        return self.held_out is None or is_held_out(text, *self.held_out) == (self.which == "val")

    def _unseen_separator(self, n_read: int) -> str | None:
        """The separator of documents if it cannot have occurred, because there are
        as many documents as files.
        """
        source = self.text_source
        if not isinstance(source, LocalFiles) or n_read > len(source.paths):
            return None
        return source.separator

    def empty_error(self, n_read: int, kind: str = "documents") -> UserError:
        """The error to raise if none of the `n_read` documents or rows of the source is
        in the split.
        """
        if not n_read or self.held_out is None:
            content = "text" if kind == "documents" else kind
            problem = f"no {kind}, only blank lines or nothing at all"
            return UserError(self.text_source.name, problem, f"Give a file with {content}")
        separator = self._unseen_separator(n_read)
        if separator is not None:
            setting = "data.document_separator"
            problem = (
                f"'{separator}' does not occur in {self.text_source.name}, "
                "so each .txt file is one document"
            )
            fix = how_to_write(separator, setting)
            return UserError(setting, problem, f"Set {{}} to what divides documents{fix}", setting)
        found = f"got 0 of {n_read} {kind} (data.val_fraction {self.held_out[0]})"
        fix = f"Give more {kind}, another data.val_fraction, or data.val_dataset"
        return UserError(self.text_source.name, f"{NAMES[self.which]} {found}", fix)


def how_to_write(separator: str, setting: str) -> str:
    r"""How a shell must be given a separator that was typed with a backslash; "" for another one.

    >>> how_to_write("---", "data.document_separator")
    ''
    >>> print(how_to_write(r"\n\n", "--separator"))
    ; for the characters meant write --separator=$'\n\n' (in YAML "\n\n")
    """
    if "\\" not in separator:
        return ""
    return f"; for the characters meant write {setting}=$'{separator}' (in YAML \"{separator}\")"


def is_held_out(text: str, fraction: float, seed: int) -> bool:
    """Whether a document is for validation: its hash with the seed is
    in the first `fraction` of all hashes.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
