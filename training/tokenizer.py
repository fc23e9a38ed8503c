"""A tokenizer of kind bpe, unigram or char, learned from the training text of a run.

BPE and Unigram take most of the time of a small run, so what it learned is kept in data.cache_dir, in a folder
whose name depends on everything that the result depends on.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, zip_longest
from pathlib import Path

from tinylm.common.console import OnProgress
from tinylm.common.errors import UserError
from tinylm.common.files import make_once
from tinylm.config.schema import DataConfig, TokenizerConfig
from tinylm.text.data_source import data_sources
from tinylm.text.documents import text_chunks
from tinylm.text.hub_dataset import HubDataset
from tinylm.text.sources import Split, TextSource
from tinylm.tokenizer.added import add_special_tokens
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.bpe_fast import learn_bpe
from tinylm.tokenizer.bpe_files import LearnedVocabulary, check_request
from tinylm.tokenizer.byte_char import CharTokenizer
from tinylm.tokenizer.hf import HFTokenizer
from tinylm.tokenizer.hf_files import load_hf_tokenizer
from tinylm.tokenizer.pretokenize import SPECIAL_TOKENS, Pretokenizer
from tinylm.tokenizer.unigram import learn_unigram

# Part of the names of cached folders: raise it when the same text would give other merges.
VERSION = 1


def learn_from_documents(
    config: TokenizerConfig, data: DataConfig, seed: int, *, on_progress: OnProgress | None = None
) -> Tokenizer:
    """A tokenizer learned from the training documents of a run, once for the same text but for char.

    In a mixture these are the documents of all sources, whatever their weights.

    Raises:
        UserError: as `training_split`, `CharTokenizer.of_documents` and `learn_bpe`,
            or an endless stream would be read.
    """
    split = training_split(data, seed)
    streamed = isinstance(split.text_source, HubDataset) and data.streaming
    if streamed and split.limit is None and config.learn_docs is None:
        raise UserError(
            "tokenizer.learn_docs",
            f"kind {config.kind} would read all of a streamed dataset",
            "Set tokenizer.learn_docs, for example to 100000",
        )
    if config.kind == "char":
        return learn_from_texts(config, split.documents())
    return _cached(config, data, split, on_progress)


def _cached(
    config: TokenizerConfig, data: DataConfig, split: Split, on_progress: OnProgress | None
) -> HFTokenizer:
    """The tokenizer of a split, learned unless data.cache_dir has it."""
    assert config.vocab_size is not None  # TokenizerConfig requires it
    pretokenizer = pretokenizer_of(config)
    check_request(config.vocab_size, pretokenizer)
    text = [
        split.text_source.fingerprint,
        data.text_field,
        data.document_separator,
        split.held_out,
        split.limit,
        config.learn_docs,
    ]
    words = [pretokenizer.expression, pretokenizer.special_tokens]
    depends_on = [VERSION, text, config.vocab_size, *words]
    key = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:16]
    folder = Path(data.cache_dir) / f"{config.kind}-{key}"

    def make(temporary: Path) -> None:
        _learn(config, split.documents(), os.cpu_count() or 1, on_progress).write_files(temporary)

    make_once(folder, make, setting="data.cache_dir")
    return load_hf_tokenizer(str(folder))


def learn_from_texts(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """A tokenizer learned from texts, which is not cached.

    Raises:
        UserError: as `CharTokenizer.of_documents` and `learn_bpe`.
    """
    if config.kind == "char":
        texts = islice(texts, config.learn_docs)
        tokenizer = CharTokenizer.of_documents(texts, unknown=config.unknown)
        return add_special_tokens(tokenizer, config.special_tokens)
    learned = _learn(config, texts)
    return HFTokenizer(learned.backend(), eos=learned.eos, pad=learned.pad)


def _learn(
    config: TokenizerConfig,
    texts: Iterable[str],
    processes: int = 1,
    on_progress: OnProgress | None = None,
) -> LearnedVocabulary:
    assert config.vocab_size is not None
    texts, pretokenizer = islice(texts, config.learn_docs), pretokenizer_of(config)
    if config.kind == "unigram":
        return learn_unigram(texts, config.vocab_size, pretokenizer)
    return learn_bpe(
        text_chunks(texts),
        config.vocab_size,
        pretokenizer,
        processes=processes,
        on_progress=on_progress,
    )


def pretokenizer_of(config: TokenizerConfig) -> Pretokenizer:
    """How BPE or Unigram of these settings splits texts into words."""
    more = [name for name in config.special_tokens if name not in SPECIAL_TOKENS]
    return Pretokenizer(config.pattern or "gpt2", (*SPECIAL_TOKENS, *more))


# --- the text that tokenizers learn from ---


@dataclass(frozen=True)
class InterleavedSources:
    """The documents of several sources, one of each in turn,
    so that the first ones are of all of them.
    """

    sources: tuple[TextSource, ...]

    @property
    def name(self) -> str:
        return ", ".join(source.name for source in self.sources)

    def documents(self) -> Iterator[str]:
        """Every document that is not blank."""
        for turn in zip_longest(*(source.documents() for source in self.sources)):
            yield from (text for text in turn if text is not None)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the fingerprints of the sources."""
        parts = " ".join(source.fingerprint for source in self.sources)
        return hashlib.sha256(parts.encode()).hexdigest()


def training_split(data: DataConfig, seed: int) -> Split:
    """The training documents of all sources.

    Raises:
        UserError: as `data_sources`, or a source is a token file.
    """
    splits = [source.text_split() for source in data_sources(data, "train", seed)]
    if len(splits) == 1:
        return splits[0]
    sources = InterleavedSources(tuple(split.text_source for split in splits))
    return Split("train", sources, splits[0].held_out, None)
