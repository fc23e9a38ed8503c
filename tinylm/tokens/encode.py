"""Documents to token files, by several processes, in document order; and the token file of a split.

    jobs       a source in portions that cut no document                                       `jobs_of`
    ids        a portion, encoded by whichever process is free: documents, each closed by EOS    `Encoder`
    file       written by this process in the order of the portions, and gone on with later      `encode_file`
    split      a file that the settings name, or one that is made from text                      `cached_token_file`

The bytes of a file depend on its `Recipe`, never on the number of processes or on interruptions. Memory holds a few portions.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tinylm.common.errors import UserError, printable, require_regular
from tinylm.common.processes import Progress, in_order
from tinylm.config.schema import DataConfig
from tinylm.text import chunks, documents
from tinylm.text.chunks import SpanChunk, TextChunk, limit_processes, text_chunks
from tinylm.text.documents import Met
from tinylm.text.sources import BIN, LocalFiles, Source, Together, is_token_file
from tinylm.text.splits import Split, Which, check_token_files, find_split, named_source
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.factory import tokenizer_from_plain
from tinylm.tokens.token_file import VERSION, TokenFile, checked_tokens, token_dtype
from tinylm.tokens.token_file_writer import Draft, locked

# Text is handed to the tokenizer in batches of so many documents or characters, whichever is first.
BATCH_DOCUMENTS, BATCH_CHARACTERS = 256, 1_000_000
# A smaller text is encoded sooner without helpers, which take most of a second to start.
WORTH_PROCESSES = 24 * 2**20


# --- documents to ids -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """Documents behind each other: their tokens, (N,) in the type of a token file, and where each ends, (D,) int64."""

    tokens: np.ndarray
    ends: np.ndarray

    def documents(self) -> Iterator[np.ndarray]:
        """The tokens of each document."""
        return (self.tokens[start:stop] for start, stop in pairwise([0, *self.ends.tolist()]))

    def first(self, documents: int) -> "Chunk":
        """The first `documents` of them, at least one."""
        return Chunk(self.tokens[: self.ends[documents - 1]], self.ends[:documents])

    @classmethod
    def joined(cls, chunks: Iterable["Chunk"]) -> "Chunk":
        """All chunks as one."""
        chunks = [cls(np.empty(0, dtype=np.uint16), np.empty(0, dtype=np.int64)), *chunks]
        starts = np.cumsum([0, *(len(chunk.tokens) for chunk in chunks)])
        ends = [chunk.ends + start for chunk, start in zip(chunks, starts, strict=False)]
        return cls(np.concatenate([chunk.tokens for chunk in chunks]), np.concatenate(ends))


class CannotEncode(UserError):
    """Why the tokenizer refused a document; whoever numbers the documents adds which it is."""


def encode_documents(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    max_doc_len: int | None,
    *,
    source: str = "text:",
    first: int = 1,
) -> Iterator[np.ndarray]:
    """The tokens of each document, cut to `max_doc_len` and closed by EOS: (n + 1,) in the type of a token file.

    Args:
        documents: their texts.
        tokenizer: what they are encoded with.
        max_doc_len: tokens after which a document is cut.
        source: what an error calls them, such as `Split.label`.
        first: the number by which an error calls the first of them; a resumed stream does not begin at 1.

    Raises:
        UserError: naming the document that the tokenizer cannot encode.
    """
    try:
        for chunk in encoded_chunks(documents, tokenizer, max_doc_len):
            yield from chunk.documents()
            first += len(chunk.ends)
    except CannotEncode as problem:
        raise UserError(f"{source} document {first}: {problem}") from None


def encoded_chunks(
    documents: Iterable[str], tokenizer: Tokenizer, max_doc_len: int | None
) -> Iterator[Chunk]:
    """The documents in batches, encoded; all before the one that raises come first.

    Raises:
        CannotEncode: the tokenizer refuses the document behind the last chunk.
    """
    for batch in _batches(documents):
        try:
            arrays = tokenizer.encode_arrays(batch)
        except UserError as problem:
            good, problem = _first_refusal(batch, tokenizer, problem)
            if good:
                yield _chunk(good, tokenizer, max_doc_len)
            raise CannotEncode(str(problem)) from None
        yield _chunk(arrays, tokenizer, max_doc_len)


def _first_refusal(
    batch: list[str], tokenizer: Tokenizer, problem: UserError
) -> tuple[list[np.ndarray], UserError]:
    """The ids of the documents before the one that the tokenizer refuses, and why: of a batch it does not say which it was."""
    good: list[np.ndarray] = []
    try:
        for text in batch:
            good += tokenizer.encode_arrays([text])
    except UserError as first:
        return good, first
    raise problem


def _chunk(arrays: list[np.ndarray], tokenizer: Tokenizer, max_doc_len: int | None) -> Chunk:
    if max_doc_len is not None:
        arrays = [ids[:max_doc_len] for ids in arrays]
    eos = np.array([tokenizer.eos_id], dtype=token_dtype(tokenizer.vocab_size))
    tokens = np.concatenate([piece for ids in arrays for piece in (ids, eos)])
    return Chunk(
        checked_tokens(tokens, tokenizer.vocab_size), np.cumsum([len(ids) + 1 for ids in arrays])
    )


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """The documents in lists; those before an error come before it."""
    batch: list[str] = []
    characters = 0
    try:
        for document in documents:
            batch.append(document)
            characters += len(document)
            if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    except UserError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


# --- portions, for the processes --------------------------------------------------------------------------------------


def jobs_of(source: Source) -> Iterator[SpanChunk | TextChunk]:
    """The source in portions; they depend on the source alone, and an error in reading it is the last of them."""
    try:
        yield from _jobs_of(source)
    except UserError as error:
        yield TextChunk([], error)


def _jobs_of(source: Source) -> Iterator[SpanChunk | TextChunk]:
    if isinstance(source, Together):
        yield from chain.from_iterable(map(_jobs_of, source.sources))
        return
    if not isinstance(source, LocalFiles):
        yield from text_chunks(source.documents())
        return
    for path in source.paths:
        require_regular(path)
        end = documents.end_of_document(path, source.separator)
        if end is None:
            met = Met()
            yield from text_chunks(
                documents.file_documents(path, source.field, source.separator, met=met), met
            )
        else:
            yield from (
                SpanChunk(path, source.field, source.separator, span)
                for span in documents.spans_of(path, end)
            )


def size_of(source: Source) -> int:
    """Bytes that the jobs of the source will have; 0 where only reading tells."""
    if isinstance(source, Together):
        sizes = [size_of(one) for one in source.sources]
        return sum(sizes) if all(sizes) else 0
    if not isinstance(source, LocalFiles) or any(
        documents.end_of_document(path, source.separator) is None for path in source.paths
    ):
        return 0
    return sum(os.path.getsize(path) for path in source.paths if os.path.exists(path))


@dataclass(frozen=True)
class Encoded:
    """What a process makes of a job."""

    chunk: Chunk
    """the documents of the split"""
    read: int
    """documents in the job, also those of the other split"""
    size: int
    spelled: list[int]
    """numbers of documents of the chunk that spell the tokenizer's end of text"""
    separated: bool
    """whether a separator was met"""
    error: UserError | None
    """what is wrong with the document behind the last one"""


@dataclass(frozen=True)
class Encoder:
    """Encodes jobs: what each process is given once."""

    tokenizer: Tokenizer
    max_doc_len: int | None
    split: Split

    def __call__(self, job: SpanChunk | TextChunk) -> Encoded:
        read = kept = 0
        spelled, met = [], Met()
        end_of_text = name_of_eos(self.tokenizer)

        def of_split() -> Iterator[str]:
            nonlocal read, kept
            for text in job.texts(met):
                read += 1
                if self.split.has(text):
                    if end_of_text in text:
                        spelled.append(kept)
                    kept += 1
                    yield text

        chunks, error = [], None
        try:
            chunks.extend(encoded_chunks(of_split(), self.tokenizer, self.max_doc_len))
        except UserError as problem:
            error = problem
        return Encoded(Chunk.joined(chunks), read, job.size, spelled, met.separator, error)

    def __reduce__(self) -> tuple[Any, ...]:
        return _encoder, (self.tokenizer.to_plain(), self.max_doc_len, self.split)


def _encoder(plain: dict[str, Any], max_doc_len: int | None, split: Split) -> Encoder:
    return Encoder(tokenizer_from_plain(plain), max_doc_len, split)


# --- the file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Everything that the bytes of a token file depend on."""

    split: Split
    tokenizer: Tokenizer
    text_field: str = "text"
    separator: str | None = None
    max_doc_len: int | None = None
    label: str = "text:"
    """what an error calls the documents"""

    @cached_property
    def source(self) -> str:
        """SHA-256 over the text, or the name of a hub dataset; files are read for it."""
        return self.split.source.fingerprint()

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits."""
        reading = [self.text_field, self.separator, self.max_doc_len]
        which = None if self.split.held_out is None else [self.split.which, *self.split.held_out]
        settings = [
            VERSION,
            self.source,
            reading,
            which,
            self.split.limit,
            self.tokenizer.fingerprint,
        ]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def encode_file(
    path: Path,
    recipe: Recipe,
    *,
    processes: int = 1,
    resume: bool = True,
    keep: bool = False,
    place: str = "data.cache_dir",
    progress: Progress | None = None,
) -> None:
    """Write the token file `path`, whole or not at all; the caller holds `locked(path)`.

    Args:
        path: where the file goes.
        recipe: what goes into it.
        processes: how many encode.
        resume: go on with what an interrupted call left.
        keep: leave what is done after an error as well, for the next call.
        place: the setting that decides where the file goes, for errors.
        progress: called after each portion.

    Raises:
        UserError: as the source, the tokenizer and `Draft`, or the split has no document.
    """
    cut = f"{documents.SPAN_BYTES} bytes, {chunks.CHUNK_CHARACTERS} characters"
    with Draft(
        path, recipe.tokenizer, recipe.fingerprint, cut=cut, resume=resume, keep=keep, place=place
    ) as draft:
        _fill(draft, recipe, processes, progress)
        if not draft.state.documents:
            raise recipe.split.nothing(draft.state.read)
        all_read = draft.state.documents != recipe.split.limit
        draft.finish(
            recipe.source,
            unseparated=recipe.separator is not None and not draft.state.separated and all_read,
        )


def _fill(draft: Draft, recipe: Recipe, processes: int, progress: Progress | None) -> None:
    """Encode what the draft does not have yet."""
    jobs, split = jobs_of(recipe.split.source), recipe.split
    done, total = sum(job.size for job in islice(jobs, draft.state.portions)), size_of(split.source)
    jobs, processes = limit_processes(jobs, processes, WORTH_PROCESSES)
    for encoded in in_order(Encoder(recipe.tokenizer, recipe.max_doc_len, split), jobs, processes):
        chunk, before = encoded.chunk, draft.state.documents
        if split.limit is not None and before + len(chunk.ends) >= split.limit:
            chunk = chunk.first(split.limit - before)
            _append(draft, chunk, encoded)
            return
        if isinstance(encoded.error, CannotEncode):
            raise UserError(
                f"{recipe.label} document {before + len(chunk.ends) + 1}: {encoded.error}"
            )
        if encoded.error is not None:
            raise encoded.error
        _append(draft, chunk, encoded)
        done += encoded.size
        if progress is not None:
            progress("bytes", done, total)


def _append(draft: Draft, chunk: Chunk, encoded: Encoded) -> None:
    spelled = sum(number < len(chunk.ends) for number in encoded.spelled)
    draft.append(
        chunk.tokens, chunk.ends, read=encoded.read, spelled=spelled, separated=encoded.separated
    )


def finished_file(path: Path, recipe: Recipe) -> TokenFile | None:
    """The token file `path` where it is there and is what `recipe` makes.

    Raises:
        UserError: something else is there, or it is damaged.
    """
    if not os.path.lexists(path):
        return None
    mend = "Delete it, or choose another --out."
    require_regular(path)
    file = TokenFile.open(path, mend)
    if file.header.recipe != recipe.fingerprint:
        raise UserError(
            f"{printable(path)}: is there already, and was made from other text, with another tokenizer or other settings. {mend}"
        )
    file.verify()
    return file


def name_of_eos(tokenizer: Tokenizer) -> str:
    """How a text would spell the tokenizer's end of text."""
    return tokenizer.special_names[tokenizer.eos_id]


def notes_on_text(
    name: str, file: TokenFile, tokenizer: Tokenizer, separator: str | None, setting: str
) -> list[str]:
    """What a user should know of the text that became `file`, a line each.

    Args:
        name: what the text is called.
        file: what `encode_file` wrote.
        tokenizer: what it was encoded with.
        separator: what divides documents in a .txt file.
        setting: what says so: a setting or a flag.
    """
    header, eos, notes = file.header, name_of_eos(tokenizer), []
    if header.spelled_eos:
        found = f"{header.spelled_eos:,} of {header.documents:,} documents have {printable(eos)} in their text, where it is characters and ends nothing"
        notes.append(
            f"warning: {printable(name)}: {found}. If it divides documents of a .txt file, set {setting} to '{printable(eos)}'"
        )
    if header.unseparated:
        notes.append(
            f"warning: {printable(name)}: {setting} '{printable(separator)}' does not occur in it, so that each .txt file is one document"
        )
    return notes


# --- the token file of a split ----------------------------------------------------------------------------------------


# What to do about a file in data.cache_dir that is damaged.
_DELETE = "Delete it: it is made again from the text."


def source_fingerprint(data: DataConfig, which: Which) -> str:
    """SHA-256 over the text that a split is made from: the contents of local files, or the name of a hub dataset."""
    return find_split(
        data, which, seed=0
    ).source.fingerprint()  # the seed decides who is held out, not what is read


def cached_token_file(
    data: DataConfig,
    which: Which,
    tokenizer: Tokenizer,
    seed: int,
    *,
    progress: Progress | None = None,
) -> TokenFile:
    """The tokens of a split: data.dataset itself where that is a token file, else a file in data.cache_dir.

    The cached file is named by all that its content depends on, made where it is missing, and verified before use.

    Raises:
        UserError: as `train_documents`, `encode_file` and `TokenFile.verify`, or the tokens are another tokenizer's.
    """
    check_token_files(data)
    if is_token_file(named_source(data, which)[1]):
        return _given_token_file(data, which, tokenizer)
    split = find_split(data, which, seed)
    recipe = Recipe(
        split, tokenizer, data.text_field, data.document_separator, data.max_doc_len, split.label
    )
    path = Path(data.cache_dir) / f"{which}-{recipe.fingerprint}{BIN}"
    if not os.path.exists(path):  # unlike Path.exists, False for a name that is too long
        with locked(path):
            if not os.path.exists(path):  # or else another process made it while this one waited
                encode_file(path, recipe, processes=os.cpu_count() or 1, progress=progress)
    file = TokenFile.open(path, _DELETE)
    file.verify()
    file.require_tokenizer(tokenizer)
    return file


def _given_token_file(data: DataConfig, which: Which, tokenizer: Tokenizer) -> TokenFile:
    """The token file that the settings name, or the part of it that is for `which`.

    Without a val_dataset the last val_fraction of data.dataset, from the start of a document on, is for validation.
    A document that stands in the file twice can then be on both sides, which `mix.shared_in_token_files` counts.
    """
    path = named_source(data, which)[1]
    require_regular(path)
    found = os.stat(path)
    file = _verified(
        path, tokenizer, data.token_dtype, (found.st_ino, found.st_size, found.st_mtime_ns)
    )
    if data.val_dataset is not None:
        return file
    border = file.document_border(len(file) - round(len(file) * data.val_fraction))
    return file.between(0, border) if which == "train" else file.between(border, len(file))


@lru_cache(maxsize=1024)
def _verified(
    path: str, tokenizer: Tokenizer, dtype: str | None, stamp: tuple[int, ...]
) -> TokenFile:
    """A token file that the user gave, read whole: once, although both splits ask for it; again where `stamp` says that it has changed."""
    file = TokenFile.open(path, tokenizer=tokenizer, dtype=dtype)
    file.require_tokenizer(tokenizer)
    file.verify()
    return file
