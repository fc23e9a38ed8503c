"""What `eval_val.py` does: score a checkpoint on the validation data of a config."""

import argparse
import json
import logging

import torch

from tinylm.checkpoint.format import read
from tinylm.checkpoint.load import Loaded, load_model
from tinylm.cli.loading import choose_tokenizer
from tinylm.common.device import pick_device
from tinylm.common.errors import UserError, printable
from tinylm.config.loader import load_config
from tinylm.config.schema import Config
from tinylm.eval.validation import (
    ValidationData,
    answer_validation,
    score_checkpoint,
    text_validation,
)
from tinylm.model.hf_model import HFSeq2Seq

logger = logging.getLogger(__name__)


def eval_val(arguments: argparse.Namespace) -> int:
    """Score the checkpoint and print the numbers."""
    config = load_config(arguments.config, arguments.overrides)
    device, reason = pick_device(config.hardware.accelerator, key="hardware.accelerator")
    logger.info("device: %s (%s)", device, reason)
    if config.hardware.threads is not None:
        torch.set_num_threads(config.hardware.threads)
    loaded = load_model(arguments.ckpt, device)
    if isinstance(loaded.model, HFSeq2Seq):
        raise UserError(
            arguments.ckpt,
            "an encoder-decoder, which answers questions and does not predict plain text",
            "Use evaluate_checkpoints.py --tasks",
        )
    tokenizer = choose_tokenizer(arguments.tokenizer, loaded.tokenizer)
    validation = answer_validation if arguments.answers else text_validation
    data = validation(config, loaded, tokenizer)
    log_differences(arguments, config, loaded, data)
    score = score_checkpoint(loaded, tokenizer, data.batches)
    numbers = {
        "val_loss": score.loss,
        "val_ppl": score.perplexity,
        "val_bpb": score.bits_per_byte,
        "tokens": score.tokens,
    }
    if arguments.answers:
        numbers["val_accuracy"] = score.accuracy
    if arguments.json:
        print(json.dumps({"ckpt": str(arguments.ckpt), "step": loaded.info.step} | numbers))
        return 0
    line = f"val_loss {score.loss:.4f}  val_ppl {score.perplexity:.3f}  "
    line += f"val_bpb {score.bits_per_byte:.4f}"
    if arguments.answers:
        line += f"  val_accuracy {score.accuracy:.3f}"
    source = f"{printable(arguments.ckpt)}, step {loaded.info.step}"
    print(f"{line}  on {score.tokens:,} tokens ({source})")
    return 0


def log_differences(
    arguments: argparse.Namespace, config: Config, loaded: Loaded, data: ValidationData
) -> None:
    """Log whether the data or the row length differ from the training run."""
    trained_with = read(arguments.ckpt)["data"]["val"]
    if data.fingerprint != trained_with:
        logger.info(
            "note: not the validation data of the training run (%s, here %s); "
            "the model may have been trained on some of them",
            trained_with,
            data.fingerprint,
        )
    seq_len, requested = loaded.config.training.seq_len, config.training.seq_len
    if seq_len != requested and not arguments.answers:
        logger.info(
            "note: rows of %d tokens, as in the training of the checkpoint, not of %d, as in %s; "
            "scores of different lengths are not comparable",
            seq_len,
            requested,
            arguments.config,
        )
