"""Which checkpoint, tokenizer and template the flags mean."""

import argparse
import logging
from pathlib import Path

from tinylm.checkpoint.load import Loaded
from tinylm.checkpoint.result import model_folders, model_of_run
from tinylm.common.errors import UserError, printable, rename_settings
from tinylm.rows.conversation import CHAT_STAGES
from tinylm.rows.templates import Template
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.factory import named_tokenizer

logger = logging.getLogger(__name__)


def choose_checkpoint(arguments: argparse.Namespace) -> Path:
    """--ckpt, else the model of the run in --dir, and for --chat the newest fine-tuned one below it;
    damaged checkpoints are skipped and logged.
    """
    if arguments.ckpt is not None:
        return arguments.ckpt[0]
    if arguments.chat:
        return newest_fine_tuned(arguments.dir)
    found = model_of_run(arguments.dir, log_skipped)
    if found is None:
        fix = "Train one (python train.py --config config_smoke.yaml), or give --ckpt FILE"
        if below := model_folders(arguments.dir):
            fix = f"Give one of its folders: --dir {' or '.join(map(str, below[:4]))}"
        raise UserError(arguments.dir, "contains no checkpoint", fix)
    return found[0]


def newest_fine_tuned(folder: Path) -> Path:
    """The fine-tuned model below `folder` whose run was trained last; the others are logged."""
    trained: dict[Path, float] = {}
    for run_dir in model_folders(folder):
        try:
            found = model_of_run(run_dir, log_skipped)
        except UserError as error:  # all of them are damaged; other folders have others
            log_skipped(error)
            continue
        if found is not None and found[1]["stage"] in CHAT_STAGES:
            trained[found[0]] = found[1]["created"]
    if not trained:
        raise UserError(
            folder,
            "contains no fine-tuned checkpoint, nor does a folder in it",
            "Fine-tune a model (python finetune.py --config config_finetune.yaml), "
            "or give --ckpt FILE",
        )
    chosen, *others = sorted(trained, key=lambda path: -trained[path])
    if others:
        names = ", ".join(map(str, others))
        logger.info("newest of %d fine-tuned models; --ckpt opens another: %s", len(trained), names)
    return chosen


def log_skipped(error: UserError) -> None:
    """Log a checkpoint that cannot be used."""
    logger.warning("skipped: %s", error)


def choose_tokenizer(name: str, own: Tokenizer) -> Tokenizer:
    """The checkpoint's own tokenizer for `auto`, else the named one.

    Raises:
        UserError: it does not exist, or its size is not the one that the model was trained with.
    """
    if name == "auto":
        return own
    if not name:
        raise UserError(
            "--tokenizer", "is empty", "Give auto, byte, or a Hugging Face name or folder"
        )
    with rename_settings({"tokenizer.path": "--tokenizer"}):
        tokenizer = named_tokenizer(name)
    if tokenizer.vocab_size != own.vocab_size:
        raise UserError(
            "--tokenizer",
            f"{name} has {tokenizer.vocab_size} tokens, "
            f"but the model was trained with {own.vocab_size}",
            "Remove --tokenizer",
        )
    return tokenizer


def choose_template(
    arguments: argparse.Namespace, loaded: Loaded, tokenizer: Tokenizer
) -> Template | None:
    """The template of the fine-tuning; None for a base model and with --no-wrap.

    Raises:
        UserError: --chat or --system needs a template, and there is none.
    """
    if loaded.template is not None and not arguments.no_wrap:
        hint = "" if arguments.chat else "; --no-wrap continues the prompt as plain text"
        logger.info("template: %s, as in fine-tuning%s", loaded.template, hint)
        return loaded.make_template(tokenizer)
    if arguments.chat:
        raise UserError(
            "--chat",
            f"{loaded.info.path} is a base model, which continues text and does not answer "
            "questions",
            "Fine-tune it first (python finetune.py --config config_finetune.yaml), "
            "or continue a text: --prompt TEXT",
        )
    if arguments.system is not None:
        raise UserError(
            "--system", "only valid for a fine-tuned model, without --no-wrap", "Remove it"
        )
    return None


def choose_system(
    arguments: argparse.Namespace, loaded: Loaded, template: Template | None
) -> str | None:
    """The system message: --system, of which "" is none,
    else the most common one of the fine-tuning rows.
    """
    if arguments.system is not None or template is None:
        return arguments.system or None
    if loaded.system is not None:
        line = " ".join(loaded.system.split())
        line = line if len(line) <= 80 else f"{line[:79]}…"
        logger.info("system: %s (from the fine-tuning rows; --system replaces it)", printable(line))
    return loaded.system
