"""Documents to the token file of a split: encoded once, kept in data.cache_dir, named by all that its content depends on.

    ids     (n + 1,) uint16 or uint32 a document: its n tokens, at most max_doc_len, then EOS          `encode_documents`
    file    the tokens of a split: a file that the settings name, or one that is made from text        `cached_token_file`
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from tinylm.config import DataConfig
from tinylm.corpus import Split, Which, check_token_files, find_split, give_text, named_source
from tinylm.errors import UserError, printable
from tinylm.tokenfile import BIN, BLOCK, VERSION, TokenFile, checked_tokens, is_token_file, locked, token_dtype, write_locked
from tinylm.tokenizer import Tokenizer

# Text is handed to the tokenizer in batches of so many documents or characters, whichever is first.
BATCH_DOCUMENTS, BATCH_CHARACTERS = 256, 1_000_000


def encode_documents(documents: Iterable[str], tokenizer: Tokenizer, max_doc_len: int | None, *, source: str = "text:", first: int = 1) -> Iterator[np.ndarray]:
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
    for batch in _batches(documents):
        arrays = _encode_batch(batch, tokenizer, source, first)
        first += len(batch)
        for ids in arrays:
            tokens = np.empty(min(len(ids), max_doc_len or len(ids)) + 1, dtype=token_dtype(tokenizer.vocab_size))
            tokens[:-1] = checked_tokens(ids[: len(tokens) - 1], tokenizer.vocab_size)
            tokens[-1] = tokenizer.eos_id
            yield tokens


def _encode_batch(batch: list[str], tokenizer: Tokenizer, source: str, first: int) -> list[np.ndarray]:
    try:
        return tokenizer.encode_arrays(batch)
    except UserError:
        for number, text in enumerate(batch, start=first):  # the tokenizer does not say which of them it was
            try:
                tokenizer.encode(text)
            except UserError as problem:
                raise UserError(f"{source} document {number}: {problem}") from None
        raise


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# --- the token file of a split ----------------------------------------------------------------------------------------


# What to do about a file in data.cache_dir that is damaged.
_DELETE = "Delete it: it is made again from the text."


def source_fingerprint(data: DataConfig, which: Which) -> str:
    """SHA-256 over what a split is made from: the contents of local files, or the name of a hub dataset."""
    key, name = named_source(data, which)
    if is_token_file(name):
        return TokenFile.open(name, give_text(key)).header.sha256
    return find_split(data, which, seed=0).source.fingerprint()  # the seed decides who is held out, not what is read


def cached_token_file(data: DataConfig, which: Which, tokenizer: Tokenizer, seed: int, *, progress: Callable[[int], None] | None = None) -> TokenFile:
    """The tokens of a split: data.dataset itself where that is a token file, else a file in data.cache_dir.

    The cached file is named by all that its content depends on, made where it is missing, and verified before use.

    Raises:
        UserError: as `train_documents`, `write_token_file` and `TokenFile.verify`, or the tokens are another tokenizer's.
    """
    check_token_files(data)
    if is_token_file(named_source(data, which)[1]):
        return _given_token_file(data, which, tokenizer)
    split = find_split(data, which, seed)
    source = split.source.fingerprint()
    path = Path(data.cache_dir) / f"{which}-{_cache_key(split, source, data, tokenizer)}{BIN}"
    if not os.path.exists(path):  # unlike Path.exists, False for a name that is too long
        with locked(path):
            if not os.path.exists(path):  # or else another process made it while this one waited
                write_locked(path, encode_documents(split.documents(), tokenizer, data.max_doc_len, source=split.label), tokenizer, source, progress)
    file = TokenFile.open(path, _DELETE)
    file.verify()
    file.require_tokenizer(tokenizer)
    return file


def _cache_key(split: Split, source: str, data: DataConfig, tokenizer: Tokenizer) -> str:
    """16 hex digits of everything that decides which tokens the file holds."""
    reading = [data.text_field, data.document_separator, data.max_doc_len]
    which = None if split.held_out is None else [split.which, *split.held_out]
    settings = [VERSION, source, reading, which, split.limit, tokenizer.fingerprint]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def _given_token_file(data: DataConfig, which: Which, tokenizer: Tokenizer) -> TokenFile:
    """The token file that the settings name, or the part of it that is for `which`.

    Without a val_dataset the last val_fraction of data.dataset, from the start of a document on, is for validation.
    A document that stands in the file twice can then be on both sides; text, split by content, has no such gap.
    """
    key, name = named_source(data, which)
    file = TokenFile.open(name, give_text(key))
    file.require_tokenizer(tokenizer)
    file.verify()
    if data.val_dataset is not None:
        return file
    border = _document_border(file, len(file) - round(len(file) * data.val_fraction))
    return file.between(0, border) if which == "train" else file.between(border, len(file))


def _document_border(file: TokenFile, wanted: int) -> int:
    """The first start of a document at or behind `wanted`, or else the last one before it."""
    tokens, eos = file.tokens, file.header.eos_id
    for start in range(max(wanted - 1, 0), len(tokens) - 1, BLOCK):
        ends = np.flatnonzero(tokens[start : min(start + BLOCK, len(tokens) - 1)] == eos)
        if len(ends):
            return start + int(ends[0]) + 1
    for stop in range(max(wanted - 1, 0), 0, -BLOCK):
        ends = np.flatnonzero(tokens[max(stop - BLOCK, 0) : stop] == eos)
        if len(ends):
            return max(stop - BLOCK, 0) + int(ends[-1]) + 1
    raise UserError(f"{printable(file.path)}: one document only, so none can be held out. Set data.val_dataset to a second token file.")
