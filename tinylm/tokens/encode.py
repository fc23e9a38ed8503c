"""Documents to one token file, by several processes, in document order.

    1. a source is cut into chunks, never inside a document                     `source.chunks()`
    2. each process takes a chunk: text ─▶ documents ─▶ those of this split     `encode_chunk`
       (train or val) ─▶ ids, EOS, ids, EOS, ...  (N,)
    3. this process writes them in the order of the chunks; it continues        `encode_file`
       a file that was interrupted

The bytes of the file depend on its `EncodeSpec`, never on the number of processes or on
interruptions. Memory holds a few chunks.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from tinylm.common.console import OnProgress
from tinylm.common.errors import UserError
from tinylm.common.files import require_regular
from tinylm.common.processes import in_order
from tinylm.text import documents
from tinylm.text.documents import SeparatorSeen, SpanChunk, TextChunk
from tinylm.text.sources import Split
from tinylm.tokenizer.base import WELL_KNOWN_EOS, Tokenizer
from tinylm.tokens.token_file import VERSION, TokenFile, checked_tokens, token_dtype
from tinylm.tokens.token_file_writer import TokenFileWriter

# The tokenizer gets batches of at most this many documents, or about this many characters.
BATCH_DOCUMENTS, BATCH_CHARACTERS = 256, 1_000_000
# A smaller text is encoded sooner by one process: starting others takes most of a second.
WORTH_PROCESSES = 24 * 2**20


# --- documents to ids -----------------------------------------------------------------------------


class CannotEncode(UserError):
    """The tokenizer refuses a document; the caller knows which one and adds it with `within`."""


def encode_documents(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    max_doc_len: int | None,
    *,
    name: str = "text:",
    first: int = 1,
) -> Iterator[np.ndarray]:
    """The tokens of each document, truncated to `max_doc_len` and closed by EOS:
    (n + 1,) in the type of a token file.

    Args:
        documents: the texts.
        tokenizer: encodes them.
        max_doc_len: tokens after which a document is truncated.
        name: their name in an error, such as `corpus.txt: training`.
        first: the number of the first document in an error; a resumed stream does not start at 1.

    Raises:
        UserError: the tokenizer cannot encode a document.
    """
    try:
        for tokens, ends in encode_batches(documents, tokenizer, max_doc_len):
            for start, stop in pairwise([0, *ends.tolist()]):
                yield tokens[start:stop]
            first += len(ends)
    except CannotEncode as error:
        raise error.within(f"{name} document {first}") from None


def encode_batches(
    documents: Iterable[str], tokenizer: Tokenizer, max_doc_len: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The documents in batches, one after the other: tokens (N,) in the type of a token file,
    and where each document ends, (D,) int64. Before an error all documents before it are given.

    Raises:
        CannotEncode: the tokenizer refuses the document after the last batch.
    """
    eos = np.array([tokenizer.eos_id], dtype=token_dtype(tokenizer.vocab_size))
    for batch in _batches(documents):
        error = None
        try:
            arrays = tokenizer.encode_arrays(batch)
        except UserError:  # it does not say of which document: one by one they do
            arrays, error = _encode_until_refusal(batch, tokenizer)
        if arrays:
            arrays = [ids[:max_doc_len] for ids in arrays]
            tokens = np.concatenate([piece for ids in arrays for piece in (ids, eos)])
            ends = np.cumsum([len(ids) + 1 for ids in arrays])
            yield checked_tokens(tokens, tokenizer.vocab_size), ends
        if error is not None:
            raise error


def _encode_until_refusal(
    batch: list[str], tokenizer: Tokenizer
) -> tuple[list[np.ndarray], CannotEncode | None]:
    """The ids of the documents before the one that the tokenizer refuses, and why it does."""
    arrays: list[np.ndarray] = []
    for text in batch:
        try:
            arrays += tokenizer.encode_arrays([text])
        except UserError as error:
            return arrays, CannotEncode(*error.args)
    return arrays, None


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """The documents in lists; the documents before an error come before it."""
    batch: list[str] = []
    n_characters = 0
    try:
        for document in documents:
            batch.append(document)
            n_characters += len(document)
            if len(batch) == BATCH_DOCUMENTS or n_characters >= BATCH_CHARACTERS:
                yield batch
                batch = []
                n_characters = 0
    except UserError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


# --- chunks, for the processes --------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedChunk:
    """A chunk after a process has encoded it."""

    tokens: np.ndarray
    """(N,) of its documents that are in the split"""
    ends: np.ndarray
    """(D,) where each of these documents ends"""
    n_read: int
    """documents in the chunk, also those of the other split"""
    size: int
    spelled: list[int]
    """numbers of the documents whose text contains the name of the end-of-text token
    as characters"""
    marked: list[tuple[int, str]]
    """numbers of the documents with the end mark of another tokenizer, and the mark"""
    separated: bool
    """whether a separator was found"""
    error: UserError | None
    """the problem with the document after the last one"""


def encode_chunk(
    chunk: SpanChunk | TextChunk, *, split: Split, tokenizer: Tokenizer, max_doc_len: int | None
) -> EncodedChunk:
    """The documents of a chunk that are in the split, encoded; each process does this."""
    # 1. the documents of this split, up to the first that cannot be read
    found = SeparatorSeen()
    texts: list[str] = []
    n_read = 0
    error = None
    try:
        for text in chunk.texts(found):
            n_read += 1
            if split.has(text):
                texts.append(text)
    except UserError as problem:
        error = problem
    # 2. their tokens, up to the first that cannot be encoded
    tokens = [np.empty(0, dtype=np.uint16)]
    ends = [np.empty(0, dtype=np.int64)]
    n_tokens = 0
    try:
        for batch_tokens, batch_ends in encode_batches(texts, tokenizer, max_doc_len):
            tokens.append(batch_tokens)
            ends.append(batch_ends + n_tokens)
            n_tokens += len(batch_tokens)
    except UserError as problem:
        error = problem
    eos_name = tokenizer.special_names[tokenizer.eos_id]
    spelled = [number for number, text in enumerate(texts) if eos_name in text]
    marked = []
    for number, text in enumerate(texts):
        marked.extend((number, mark) for mark in end_marks(text) if mark != eos_name)
    return EncodedChunk(
        np.concatenate(tokens),
        np.concatenate(ends),
        n_read,
        chunk.size,
        spelled,
        marked,
        found.seen,
        error,
    )


def end_marks(text: str) -> list[str]:
    """The end marks of published tokenizers that begin or end a line of `text`,
    as between the documents of a corpus; inside a line they are its content.

    >>> end_marks("One.</s>\\nTwo.</s>"), end_marks("<s>struck</s> through")
    (['</s>'], [])
    """
    if "<" not in text:  # as all of them have: a search for one character is much faster
        return []
    found = [mark for mark in WELL_KNOWN_EOS if mark in text]
    return [mark for mark in found if _at_border(mark).search(text)]


@cache
def _at_border(mark: str) -> re.Pattern[str]:
    return re.compile(rf"(?m)^{re.escape(mark)}|{re.escape(mark)}$")


# --- the file -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodeSpec:
    """Everything that the bytes of a token file depend on."""

    split: Split
    tokenizer: Tokenizer
    text_field: str = "text"
    separator: str | None = None
    max_doc_len: int | None = None
    label: str = "text:"
    """the name of the documents in an error"""

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits."""
        split = self.split
        reading = [self.text_field, self.separator, self.max_doc_len]
        which = None if split.held_out is None else [split.which, *split.held_out]
        text = split.text_source.fingerprint
        settings = [VERSION, text, reading, which, split.limit, self.tokenizer.fingerprint]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def encode_file(
    path: Path,
    spec: EncodeSpec,
    *,
    processes: int = 1,
    resume: bool = True,
    keep: bool = False,
    setting: str = "data.cache_dir",
    on_progress: OnProgress | None = None,
) -> None:
    """Write the token file `path`, whole or not at all;
    the caller holds `common.files.locked(path)`.

    Args:
        path: its final place.
        spec: its content.
        processes: number of processes that encode.
        resume: continue with the work of an interrupted call.
        keep: keep the work after an error as well, for the next call.
        setting: the setting or flag that decides where the file is, for errors.
        on_progress: called after each chunk.

    Raises:
        UserError: as the source, the tokenizer and `TokenFileWriter`, or the split has no document.
    """
    split = spec.split
    cut = f"{documents.SPAN_BYTES} bytes, {documents.CHUNK_CHARACTERS} characters"
    writer = TokenFileWriter(
        path, spec.tokenizer, spec.fingerprint, cut=cut, resume=resume, keep=keep, setting=setting
    )
    with writer:
        # 1. skip the chunks that an interrupted call has encoded
        parts = split.text_source.chunks()
        done = sum(part.size for part in islice(parts, writer.state.portions))
        total = 0 if on_progress is None else split.text_source.size()
        # 2. encode the others
        work = partial(
            encode_chunk, split=split, tokenizer=spec.tokenizer, max_doc_len=spec.max_doc_len
        )
        for encoded in in_order(work, parts, processes, min_size=WORTH_PROCESSES):
            if _append(writer, spec, encoded):
                break
            done += encoded.size
            if on_progress is not None:
                on_progress("encoding, bytes", done, total)
        # 3. finish the file
        state = writer.state
        if not state.documents:
            raise split.empty_error(state.read)
        all_read = state.documents != split.limit
        unseparated = spec.separator is not None and not state.separated and all_read
        writer.finish(split.text_source.fingerprint, unseparated=unseparated)


def _append(writer: TokenFileWriter, spec: EncodeSpec, encoded: EncodedChunk) -> bool:
    """Add a chunk to the file, or raise its error; whether the limit of the split is reached."""
    tokens, ends = encoded.tokens, encoded.ends
    before = writer.state.documents
    limit = spec.split.limit
    full = limit is not None and before + len(ends) >= limit
    if full:
        ends = ends[: limit - before]  # at least one
        tokens = tokens[: ends[-1]]
    elif isinstance(encoded.error, CannotEncode):
        raise encoded.error.within(f"{spec.label} document {before + len(ends) + 1}")
    elif encoded.error is not None:
        raise encoded.error
    writer.append(
        tokens,
        ends,
        read=encoded.n_read,
        spelled=sum(number < len(ends) for number in encoded.spelled),
        marks=Counter(mark for number, mark in encoded.marked if number < len(ends)),
        separated=encoded.separated,
    )
    return full


def finished_file(path: Path, spec: EncodeSpec) -> TokenFile | None:
    """The token file `path` if it exists and is the one of `spec`.

    Raises:
        UserError: something else is there, or it is damaged.
    """
    if not os.path.lexists(path):
        return None
    fix = "Delete it, or choose another --out"
    require_regular(path)
    file = TokenFile.open(path, fix)
    if file.header.recipe != spec.fingerprint:
        problem = (
            "already exists, and was made from other text, "
            "or with another tokenizer or other settings"
        )
        raise UserError(path, problem, fix)
    file.verify()
    return file
