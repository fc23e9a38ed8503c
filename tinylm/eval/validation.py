"""The validation loss of a trained checkpoint, or a verifier's scores, on the data of any config.

The rows and batches are those of validation during training, so that the same checkpoint on the
same data gives the same number, to the last digit. `eval_val.py` and `align.py` score with this.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from tinylm.checkpoint.load import Loaded, LoadedVerifier
from tinylm.common.console import progress_bar
from tinylm.common.device import autocast_dtype
from tinylm.common.errors import UserError
from tinylm.config.schema import Config, VerifierConfig
from tinylm.eval.perplexity import LanguageScore, byte_length_table, score_batches
from tinylm.eval.sampled_answers import answerer
from tinylm.eval.tasks.data import problems_of
from tinylm.eval.tasks.examples import source_examples
from tinylm.model.verifier import Verifier
from tinylm.objectives.verifier import verifier_metrics, verifier_sums
from tinylm.rows.sft import fingerprint_of_examples
from tinylm.rows.skipped_rows import RowReport
from tinylm.rows.verifier_data import (
    collate_problems,
    filter_problems,
    fingerprint_of_problems,
)
from tinylm.text.data_source import data_sources
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.example_rows import Example, collate_examples, fill_rows
from tinylm.tokens.packing import (
    Batch,
    Collate,
    RankShare,
    RowDataset,
    TokenRows,
    count_batches,
    row_collate,
    validation_order,
)
from tinylm.tokens.run_files import token_files
from tinylm.tokens.token_file import JoinedFiles

logger = logging.getLogger(__name__)


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
    files = token_files(sources, tokenizer, config.data.cache_dir)
    file = files[0] if len(files) == 1 else JoinedFiles(files)
    rows = TokenRows(file, seq_len, seq_len, tokenizer.pad_id)
    collate = row_collate(tokenizer, seq_len, document_mask=config.data.document_mask)
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
    examples: list[Example] = []
    for source in source_examples(config, "val", tokenizer, loaded.model.has_encoder):
        log_notes(source.report)
        examples += source.examples
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


def verifier_validation(config: Config, loaded: LoadedVerifier, device: str) -> ValidationData:
    """The validation problems of a config, each with its right and wrong answers.

    Args:
        config: of a verifier's run, or of any rows of problems; its data, verifier and
            training sections are used.
        loaded: the verifier; the pairs have at most its training.seq_len tokens.
        device: where the model of verifier.sampled_from answers, if it is set.

    Raises:
        UserError: see `read_problems` and `filter_problems`.
    """
    verifier = config.verifier or VerifierConfig()
    tokenizer, seq_len = loaded.tokenizer, loaded.config.training.seq_len
    max_bad = config.data.skip_bad_rows
    report = RowReport("val", seq_len, lost="the start of a problem", max_bad=max_bad)
    problems = problems_of(config, "val", report)
    if verifier.sampled_from is not None:
        with progress_bar() as progress:
            problems = answerer(config, verifier, device, progress)(problems)
    problems = filter_problems(problems, report, tokenizer, n_wrong=verifier.n_wrong)
    log_notes(report)
    collate = partial(
        collate_problems,
        tokenizer=tokenizer,
        seq_len=seq_len,
        n_wrong=verifier.n_wrong,
        seed=f"{config.training.seed} val",
    )
    return ValidationData(
        batches_in_order(problems, collate, config), fingerprint_of_problems(problems)
    )


def log_notes(report: RowReport) -> None:
    """Log which rows were skipped and which columns were not read."""
    for note in report.notes():
        logger.info(note)


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


def score_verifier(verifier: Verifier, batches: Iterable[Batch]) -> dict[str, float]:
    """`verifier_metrics` over all batches, and the number of answers."""
    device = next(verifier.parameters()).device
    totals = np.zeros(0)
    n_answers = 0
    with torch.no_grad():
        for batch in batches:
            if not len(batch["label"]):
                continue  # padding of the last batch
            right, error_mask = batch["label"].to(device), batch["error_mask"].to(device)
            logits = verifier.error_logits(
                batch["input_ids"].to(device), batch["attention_mask"].to(device)
            )
            sums = verifier_sums(logits, right, error_mask).cpu().double().numpy()
            totals = totals + sums if len(totals) else sums
            n_answers += len(right)
    return verifier_metrics(totals.tolist()) | {"answers": n_answers}
