"""What `eval_val.py` does: score checkpoints on the validation data of a config."""

import argparse
import csv
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tinylm.checkpoint.format import read
from tinylm.checkpoint.load import (
    Loaded,
    LoadedRewardModel,
    LoadedVerifier,
    model_of,
    reward_model_of,
    verifier_of,
)
from tinylm.cli.loading import choose_tokenizer
from tinylm.cli.results import Row, cell, print_rows
from tinylm.cli.subjects import Subject, find_checkpoints
from tinylm.common.device import pick_device
from tinylm.common.errors import UserError, printable
from tinylm.common.files import writing
from tinylm.config.loader import load_config, require_here
from tinylm.config.schema import Config
from tinylm.eval.pair_validation import pair_validation, score_reward_model
from tinylm.eval.tasks.data import with_data_of_task
from tinylm.eval.validation import (
    ValidationData,
    answer_validation,
    score_checkpoint,
    score_verifier,
    text_validation,
    verifier_validation,
)
from tinylm.model.hf_model import HFSeq2Seq

logger = logging.getLogger(__name__)

TABLE_FORMATS = (".csv", ".json")


def eval_val(arguments: argparse.Namespace) -> int:
    """Score the checkpoints, print the numbers and write them to --out.

    A checkpoint of several that cannot be scored is a line of its own; the exit code is then 2.
    """
    config = with_data_of_task(load_config(arguments.config, arguments.overrides))
    require_here(config, arguments.config, "data.")
    out = require_table_format(arguments.out)
    device, reason = pick_device(config.hardware.accelerator, key="hardware.accelerator")
    logger.info("device: %s (%s)", device, reason)
    if config.hardware.threads is not None:
        torch.set_num_threads(config.hardware.threads)
    subjects = find_checkpoints(arguments.ckpt, flag="--ckpt")
    rows, failed = [], []
    for subject in subjects:
        try:
            rows.append(score_subject(subject, arguments, config, device))
        except UserError as error:
            if len(subjects) == 1:
                raise
            failed.append(f"FAILED: {printable(error)}")
    print_scores(rows, as_json=arguments.json, several=len(subjects) > 1)
    for line in failed:
        logger.error(line)
    if out is not None:
        write_table(out, rows)
    return 2 if failed else 0


def require_table_format(out: Path | None) -> Path | None:
    """--out, if its name ends in a format that can be written."""
    if out is not None and out.suffix not in TABLE_FORMATS:
        raise UserError(
            ("--out", out), f"must end in {' or '.join(TABLE_FORMATS)}", "Rename it: scores.csv"
        )
    return out


def score_subject(
    subject: Subject, arguments: argparse.Namespace, config: Config, device: str
) -> Row:
    """The scores of a checkpoint: of a verifier or reward model if it is one, else of a language
    model.
    """
    path = subject.paths[0]
    state = read(path)
    if state["stage"] == "verifier":
        numbers, data = verifier_scores(verifier_of(path, state, device), config, device)
    elif state["stage"] == "reward_model":
        numbers, data = reward_model_scores(reward_model_of(path, state, device), config)
    else:
        numbers, data = language_scores(model_of(path, state, device), arguments, config)
    trained_with = state.get("data", {"val": "not known"})["val"]
    if data.fingerprint != trained_with:
        logger.info(
            "note: not the validation data of the training run of %s (%s, here %s); "
            "the model may have been trained on some of them",
            subject.label,
            trained_with,
            data.fingerprint,
        )
    return {"ckpt": subject.label, "stage": state["stage"], "step": state["step"], **numbers}


def verifier_scores(
    loaded: LoadedVerifier, config: Config, device: str
) -> tuple[dict[str, Any], ValidationData]:
    """How well a verifier tells right answers from wrong ones."""
    data = verifier_validation(config, loaded, device)
    return score_verifier(loaded.model, data.batches), data


def reward_model_scores(
    loaded: LoadedRewardModel, config: Config
) -> tuple[dict[str, Any], ValidationData]:
    """How often a reward model prefers the chosen answer."""
    data = pair_validation(config, loaded)
    trained = loaded.config.reward_model
    assert trained is not None, "a reward model's checkpoint has its section"
    return score_reward_model(loaded.model, data.batches, trained.center_coef), data


def language_scores(
    loaded: Loaded, arguments: argparse.Namespace, config: Config
) -> tuple[dict[str, Any], ValidationData]:
    """How well a language model predicts texts, or with --answers answers."""
    if isinstance(loaded.model, HFSeq2Seq):
        raise UserError(
            loaded.info.path,
            "an encoder-decoder, which answers questions and does not predict plain text",
            "Use evaluate_checkpoints.py --tasks",
        )
    tokenizer = choose_tokenizer(arguments.tokenizer, loaded.tokenizer)
    validation = answer_validation if arguments.answers else text_validation
    data = validation(config, loaded, tokenizer)
    seq_len, requested = loaded.config.training.seq_len, config.training.seq_len
    if seq_len != requested and not arguments.answers:
        logger.info(
            "note: rows of %d tokens, as in the training of the checkpoint, not of %d, as in %s; "
            "scores of different lengths are not comparable",
            seq_len,
            requested,
            arguments.config,
        )
    score = score_checkpoint(loaded, tokenizer, data.batches)
    numbers = {
        "val_loss": score.loss,
        "val_ppl": score.perplexity,
        "val_bpb": score.bits_per_byte,
        "tokens": score.tokens,
    }
    if arguments.answers:
        numbers["val_accuracy"] = score.accuracy
    return numbers, data


# --- output ---


def print_scores(rows: Sequence[Row], *, as_json: bool, several: bool) -> None:
    """Print one checkpoint as a line, several as a table; or JSON."""
    if as_json:
        print(json.dumps(rows if several else rows[0]))
    elif several:
        print_rows(same_columns(rows))
    else:
        (row,) = rows
        numbers = [f"{name} {cell(row[name])}" for name in row if name.startswith("val_")]
        counted = next(name for name in ("answers", "pairs", "tokens") if name in row)
        print(
            f"{'  '.join(numbers)}  on {row[counted]:,} {counted} "
            f"({row['ckpt']}, step {row['step']})"
        )


def same_columns(rows: Sequence[Row]) -> list[Row]:
    """The rows with all columns that any of them has, None where a row has no such number."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows as CSV or as a JSON list, with numbers in full precision."""
    with writing(path, "--out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
            return
        table = same_columns(rows)
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]) if table else [])
            writer.writeheader()
            writer.writerows(table)
