"""`python -m tinylm import`: turn a Hugging Face model into a checkpoint."""

import argparse
import logging
import shlex
from pathlib import Path

from tinylm.common.errors import printable

logger = logging.getLogger(__name__)

SUMMARY = "convert a Hugging Face model to a checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.usage = "python -m tinylm import NAME_OR_FOLDER OUT.ckpt"
    parser.description = (
        "Convert a Hugging Face model to a checkpoint: Gemma, Gemma 3 (text), GPT-2, Llama, "
        "Ministral, Mistral, Mixtral, OLMo 2 and 3, Phi-3, Qwen2, Qwen3 (also with experts) or "
        "SmolLM3, from safetensors. Its logits are first compared with transformers'."
    )
    parser.add_argument(
        "name",
        metavar="NAME_OR_FOLDER",
        help="a folder with config.json and model.safetensors, or a Hugging Face name such as gpt2",
    )
    parser.add_argument("out", type=Path, metavar="OUT.ckpt", help="the new checkpoint")


def run(arguments: argparse.Namespace) -> int:
    """Write the checkpoint and print its path."""
    from tinylm.interchange.hf_import import import_hf

    imported = import_hf(arguments.name, arguments.out)
    logger.info(
        "%s, %s, stored as fp32: its logits differ from transformers' by %.1e",
        imported.model_type,
        imported.stored_as,
        imported.difference,
    )
    path = shlex.quote(str(arguments.out))
    logger.info("to train it further: training.init_from=%s, in train.py or finetune.py", path)
    logger.info('next: python infer.py --ckpt %s --prompt "Once"', path)
    print(printable(arguments.out))
    return 0
