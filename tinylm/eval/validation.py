"""The validation loss of a trained checkpoint, on the validation data of any config.

The rows and batches are those of validation during training, so that the same checkpoint on the
same data gives the same number, to the last digit. `eval_val.py` and `align.py` score with this.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tinylm.checkpoint.load import Loaded
from tinylm.common.device import autocast_dtype
from tinylm.common.errors import UserError
from tinylm.config.schema import Config
from tinylm.eval.perplexity import LanguageScore, byte_length_table, score_batches
from tinylm.eval.tasks.data import conversation_parser, requested_built_in_rows
from tinylm.rows.sft import build_examples, fingerprint_of_examples
from tinylm.rows.template_factory import make_template
from tinylm.text.data_source import data_sources
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.example_rows import collate_examples, fill_rows
from tinylm.tokens.packing import (
    Batch,
    Collate,
    RankShare,
    RowDataset,
    TokenRows,
    collate_rows,
    count_batches,
    validation_order,
)
from tinylm.tokens.run_files import validation_file


@dataclass(frozen=True)
class ValidationData:
    """All validation rows of a config as batches."""

    batches: RowDataset
    fingerprint: str
    """equal to the one in a checkpoint if these are the validation data of its run"""


def text_validation(
    config: Config, loaded: Loaded, tokenizer: Tokenizer, *, seq_len: int | None = None
) -> ValidationData:
    """The validation rows of plain text; each token but the first is a target once.

    Args:
        config: its data, training.seed and training.micro_batch_size are used.
        loaded: the checkpoint; the rows have its training.seq_len.
        seq_len: another length of the rows.
    """
    seq_len = seq_len or loaded.config.training.seq_len
    sources = data_sources(config.data, "val", config.training.seed)
    file = validation_file(sources, tokenizer, config.data.cache_dir)
    rows = TokenRows(file, seq_len, seq_len, tokenizer.pad_id)
    eos_id = tokenizer.eos_id if config.data.document_mask else None
    collate = partial(collate_rows, seq_len=seq_len, pad_id=tokenizer.pad_id, eos_id=eos_id)
    return ValidationData(batches_in_order(rows, collate, config), file.fingerprint)


def answer_validation(config: Config, loaded: Loaded, tokenizer: Tokenizer) -> ValidationData:
    """The validation rows of questions and answers, whose answers are the targets.

    Args:
        config: of a fine-tuning run; its data and training sections are used.
        loaded: the checkpoint.

    Raises:
        UserError: the rows are longer than the model's context; or see `build_examples`.
    """
    data, training = config.data, config.training
    max_seq_len = loaded.model.config.max_seq_len
    if training.seq_len > max_seq_len:
        raise UserError(
            "training.seq_len",
            f"{training.seq_len} is more than the {max_seq_len} positions of {loaded.info.path}",
            "Lower it",
        )
    examples, _ = build_examples(
        data,
        "val",
        training.seed,
        make_template(data.template, tokenizer),
        tokenizer,
        training.seq_len,
        train_on=training.train_on,
        to_conversation=conversation_parser(data),
        built_in=requested_built_in_rows(data),
    )
    collate = partial(
        collate_examples,
        seq_len=training.seq_len,
        pad_id=tokenizer.pad_id,
        packed=data.packing == "packed",
    )
    rows = fill_rows(examples, training.seq_len, data.packing)
    return ValidationData(
        batches_in_order(rows, collate, config), fingerprint_of_examples(examples)
    )


def batches_in_order(rows: Sequence[Any], collate: Collate, config: Config) -> RowDataset:
    """All rows in their order; the last batch is filled with padding."""
    share = RankShare(config.training.micro_batch_size)
    order = partial(validation_order, len(rows))
    return RowDataset(rows, order, collate, share, count_batches(len(rows), share))


def score_checkpoint(
    loaded: Loaded, tokenizer: Tokenizer, batches: Iterable[Batch]
) -> LanguageScore:
    """The score over all batches, in the precision that the checkpoint was trained in."""
    embedding = loaded.model.embedding
    dtype = autocast_dtype(loaded.config.hardware.precision)
    with torch.autocast(embedding.weight.device.type, dtype=dtype, enabled=dtype is not None):
        return score_batches(
            loaded.model, batches, byte_length_table(tokenizer, embedding.num_embeddings)
        )
