"""`python -m tinylm export`: a checkpoint as a Hugging Face folder, GGUF file or PEFT adapter."""

import argparse
import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from tinylm.common.errors import UserError, printable

if TYPE_CHECKING:
    from tinylm.interchange.hf_export import Exported

logger = logging.getLogger(__name__)

SUMMARY = (
    "write a checkpoint as a Hugging Face folder or a GGUF file, an adapter as a folder for peft"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.usage = "python -m tinylm export checkpoints/final.ckpt OUT [--format gguf] [--merge]"
    parser.description = (
        "Write a checkpoint as a Hugging Face folder or a GGUF file, "
        "an adapter as a folder for peft. The logits of an exported model are compared with ours "
        "first."
    )
    parser.add_argument("ckpt", type=Path, metavar="CKPT", help="the checkpoint")
    parser.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="for hf the new folder; for gguf the new file NAME.gguf, or a folder for it",
    )
    parser.add_argument(
        "--format",
        choices=("hf", "gguf"),
        default="hf",
        help="hf: for transformers, or for peft if it is an adapter; "
        "gguf: one file for llama.cpp (default: hf)",
    )
    parser.add_argument(
        "--floats",
        choices=("f32", "f16"),
        default="f32",
        help="for gguf: the type of its matrices (default: f32)",
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="for an adapter: write the whole model, the adapter merged into its base",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the folder or file and print its path."""
    from tinylm.checkpoint.load import holds_adapter
    from tinylm.interchange.gguf import export_gguf
    from tinylm.interchange.hf_export import export_hf

    if arguments.format == "hf" and arguments.floats != "f32":
        raise UserError(
            "--floats", "only valid for --format gguf", "Remove it, or give --format gguf"
        )
    is_adapter = holds_adapter(arguments.ckpt)
    if arguments.merge and not is_adapter:
        raise UserError(
            "--merge",
            f"{arguments.ckpt} holds a whole model, not an adapter",
            "Remove --merge",
        )
    if is_adapter and not arguments.merge:
        return export_adapter_folder(arguments)
    if arguments.format == "hf":
        exported = export_hf(arguments.ckpt, arguments.out)
    else:
        # OUT without .gguf is a folder; the file in it is named after the checkpoint.
        file = arguments.out
        if file.suffix != ".gguf":
            file = file / f"{arguments.ckpt.stem}.gguf"
        exported = export_gguf(arguments.ckpt, file, floats=arguments.floats)
    logger.info(
        "%s, %s: read back by transformers, its logits differ from ours by %.1e",
        exported.model_type,
        arguments.floats,
        exported.difference,
    )
    if exported.tokenizer_class != "AutoTokenizer":
        logger.info(
            "note: load its tokenizer with %s; "
            "AutoTokenizer pre-tokenizes differently for every %s",
            exported.tokenizer_class,
            exported.model_type,
        )
    logger.info("next: python -c %s", shlex.quote(loading_code(exported, arguments.format)))
    print(printable(exported.path))
    return 0


def export_adapter_folder(arguments: argparse.Namespace) -> int:
    """Write the folder for peft and print its path."""
    from tinylm.interchange.hf_export import export_adapter

    if arguments.format == "gguf":
        raise UserError(
            "--format gguf",
            "is not supported with an adapter alone",
            "Give --merge for the whole model, or remove --format",
        )
    exported = export_adapter(arguments.ckpt, arguments.out)
    base = exported.base
    logger.info("the adapter alone, for peft, of %s; --merge writes the whole model", base)
    logger.info("next: the Python code in %s loads both", exported.path / "README.md")
    print(printable(exported.path))
    return 0


def loading_code(exported: "Exported", kind: str) -> str:
    """Python code that loads the exported model and shows that it works."""
    path = exported.path
    if kind == "gguf":
        settings = "".join(f", {name}={value}" for name, value in exported.needs.items())
        load = f'M.from_pretrained("{path.parent}", gguf_file="{path.name}"{settings})'
        return f"from transformers import AutoModelForCausalLM as M; print({load})"
    imports, tokenizer = "from transformers import pipeline", ""
    if exported.tokenizer_class != "AutoTokenizer":
        imports += f", {exported.tokenizer_class} as T"
        tokenizer = f', tokenizer=T.from_pretrained("{path}")'
    question = exported.question
    asked = f"{question.argument}, max_new_tokens={question.max_new_tokens}"
    return f'{imports}; print(pipeline("text-generation", "{path}"{tokenizer})({asked}))'
