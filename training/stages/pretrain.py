"""Stage pretrain: next-token prediction on documents."""

from __future__ import annotations

import logging
from itertools import zip_longest
from typing import TYPE_CHECKING

import training  # training.tokenizer and tokens.overlap are imported at their first use
from data import PretrainData
from tinylm import tokens
from tinylm.common.console import progress_bar, short
from tinylm.common.errors import UserError
from tinylm.config.schema import Config, DataConfig
from tinylm.text.data_source import data_sources
from tinylm.text.sources import NAMES as WHICH
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.run_files import name_of, notes_on_text
from training.build import build_language_model
from training.context import RunContext
from training.run import Stage

if TYPE_CHECKING:
    from tinylm.tokens.overlap import SourceFiles

logger = logging.getLogger(__name__)


def learn_tokenizer(config: Config) -> Tokenizer:
    """A tokenizer of kind bpe, unigram or char, learned from the training documents."""
    settings = config.tokenizer
    with progress_bar() as on_progress:
        tokenizer = training.tokenizer.learn_from_documents(
            settings, config.data, config.training.seed, on_progress=on_progress
        )
    if settings.vocab_size is not None and tokenizer.vocab_size < settings.vocab_size:
        found = f"{tokenizer.vocab_size} tokens, not {settings.vocab_size}"
        reason = "every word of this text already is one token"
        if settings.kind == "unigram":
            reason = "this text has no more substrings that are frequent enough"
        logger.info(f"tokenizer: {found}: {reason}")
    return tokenizer


def find_data(config: Config) -> None:
    """Raise a UserError if a source of documents is not there or cannot be read."""
    for which in WHICH:
        data_sources(config.data, which, config.training.seed)


def open_data(context: RunContext, tokenizer: Tokenizer) -> PretrainData:
    """The token files of the run, or its stream; logs their size and the documents that are
    in both splits.
    """
    with progress_bar() as on_progress:
        data = PretrainData(context.config, tokenizer)
        data.prepare(on_progress)
    log_data(data)
    return data


def open_rows(context: RunContext, tokenizer: Tokenizer) -> PretrainData:
    """The training data alone."""
    data = PretrainData(context.config, tokenizer)
    data.prepare(validation=False)
    return data


def log_data(data: PretrainData) -> None:
    """Log the size of the data, how the text is split if that may surprise, and the documents that
    are in both splits.

    Raises:
        UserError: as `log_overlap`.
    """
    config, tokenizer = data.config, data.tokenizer
    train = "a stream"
    if data.train_files:
        train = f"{short(sum(map(len, data.train_files)))} tokens"
    logger.info(
        f"data: {name_of(config.data)}: train {train}, validation "
        f"{short(sum(map(len, data.val_files)))} tokens; tokenizer {config.tokenizer.kind}, "
        f"vocabulary {tokenizer.vocab_size}"
    )
    train_files = list(zip_longest(data.train_sources, data.train_files))  # a stream has no files
    val_files = list(zip(data.val_sources, data.val_files, strict=True))
    # Text that is held out is divided and encoded as the training text, so it has the same notes.
    noted = train_files
    if config.data.val_dataset is not None or config.data.streaming:
        noted = [*train_files, *val_files]
    for source, file in noted:
        if source.split is not None and file is not None:
            setting = "data.document_separator"
            for note in notes_on_text(source.name, file, tokenizer, source.separator, setting):
                logger.info(note)
    if config.data.val_dataset is None and all(source.split for source in data.val_sources):
        return  # text is divided by its content
    log_overlap(config.data, train_files, val_files)


def log_overlap(data: DataConfig, train_files: SourceFiles, val_files: SourceFiles) -> None:
    """Log how many documents are in both splits.

    Raises:
        UserError: every validation document is a training document.
    """
    shared = tokens.overlap.split_overlap(train_files, val_files)
    effect = "are also training documents; val_loss will look better than it is"
    if data.val_dataset is not None:
        if shared.found:
            logger.info(f"warning: {shared.found} documents of data.val_dataset {effect}")
    elif shared.found:
        setting = "data.dataset" if data.mix is None else "data.mix"
        held_out = f"held out at the end (data.val_fraction={data.val_fraction})"
        if shared.found == shared.of:
            problem = f"all {shared.of} documents {held_out} are also training documents"
            fix = "Encode the file again without repeated documents, or set data.val_dataset"
            raise UserError(setting, problem, fix)
        logger.info(
            f"warning: {setting}: {shared.found} of {shared.of} documents {held_out} {effect}"
        )


PRETRAIN = Stage(
    name="pretrain",
    find_data=find_data,
    learn_tokenizer=learn_tokenizer,
    open_data=open_data,
    open_rows=open_rows,
    build_module=build_language_model,
    next_command="python infer.py --ckpt {model} --prompt {prompt}",
)
