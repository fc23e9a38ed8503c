"""Which checkpoint, tokenizer and template the flags mean."""

import argparse
import logging
from pathlib import Path

from tinylm.checkpoint.format import latest_valid
from tinylm.checkpoint.info import describe
from tinylm.checkpoint.load import Loaded
from tinylm.common.errors import UserError, printable, rename_settings
from tinylm.rows.conversation import CHAT_STAGES
from tinylm.rows.template_factory import make_template
from tinylm.rows.templates import Template
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.factory import named_tokenizer

logger = logging.getLogger(__name__)


def choose_checkpoint(arguments: argparse.Namespace) -> Path:
    """--ckpt, or the latest valid checkpoint in --dir; damaged ones are skipped and logged."""
    if arguments.ckpt is not None:
        return arguments.ckpt
    if arguments.chat:
        return latest_fine_tuned(arguments.dir)
    path = latest_valid(arguments.dir, lambda error: logger.warning("skipped: %s", error))
    if path is None:
        raise UserError(
            arguments.dir,
            "contains no checkpoint",
            "Train one (python train.py --config config_smoke.yaml), or give --ckpt FILE",
        )
    return path


def latest_fine_tuned(folder: Path) -> Path:
    """The most recent fine-tuned checkpoint among the latest ones of `folder`
    and its subfolders.
    """
    folders = [folder]
    if folder.is_dir():
        folders += sorted(path for path in folder.iterdir() if path.is_dir())
    fine_tuned = []
    for place in folders:
        path = latest_valid(place, lambda error: logger.warning("skipped: %s", error))
        if path is None:
            continue
        info = describe(path)
        if info.stage in CHAT_STAGES:
            fine_tuned.append(info)
    if not fine_tuned:
        raise UserError(
            folder,
            "contains no fine-tuned checkpoint, nor does a folder in it",
            "Fine-tune a model (python finetune.py --config config_finetune.yaml), "
            "or give --ckpt FILE",
        )
    return max(fine_tuned, key=lambda info: info.created).path


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
        return make_template(loaded.template, tokenizer)
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
