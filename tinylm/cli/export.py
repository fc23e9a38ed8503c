"""`python -m tinylm export`: a checkpoint as a Hugging Face folder, GGUF file, PEFT adapter, or
smaller checkpoint.
"""

import argparse
import logging
import shlex
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tinylm.cli.model_flags import add_max_rise_flag
from tinylm.common.console import size
from tinylm.common.errors import UserError, printable, rename_settings

if TYPE_CHECKING:
    from tinylm.checkpoint.load import Loaded
    from tinylm.interchange.hf_export import Exported

logger = logging.getLogger(__name__)

SUMMARY = (
    "write a checkpoint as a Hugging Face folder, a GGUF file or a smaller checkpoint, "
    "an adapter as a folder for peft"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.usage = (
        "python -m tinylm export checkpoints/final.ckpt OUT [--format gguf --dtype q8_0] [--merge]"
    )
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
        help="for hf the new folder; for gguf the new file NAME.gguf, or a folder for it; "
        "for checkpoint the new file NAME.ckpt",
    )
    parser.add_argument(
        "--format",
        choices=("hf", "gguf", "checkpoint"),
        default="hf",
        help="hf: for transformers, or for peft if it is an adapter; "
        "gguf: one file for llama.cpp; checkpoint: the weights alone, for this project, an "
        "adapter merged (default: hf)",
    )
    for flag in ("--dtype", "--floats"):  # the second is its name in version 0.1
        parser.add_argument(
            flag,
            dest="dtype",
            type=str.lower,
            default="f32",
            metavar="TYPE",
            help="for gguf: the number type of its matrices: f32, f16, bf16, q8_0, q5_1, q5_0, "
            "q4_1, q4_0, mxfp4; through llama-cpp-python q6_k, q5_k_m, q4_k_m, q3_k_m, q2_k "
            "and others (default: f32)"
            if flag == "--dtype"
            else argparse.SUPPRESS,
        )
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="for gguf with another type than f32: held-out documents for the bits per byte that "
        "the rounding costs (default: the validation documents of the run if they are on this "
        "machine, else text that the model writes)",
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="for an adapter: write the whole model, the adapter merged into its base",
    )
    parser.add_argument(
        "--weights",
        choices=("fp32", "int8", "int4"),
        default="fp32",
        help="for checkpoint: int8 is about a quarter of the size, int4 a sixth (fp32)",
    )
    add_push_flags(parser)
    add_max_rise_flag(parser)


def add_push_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of an upload."""
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="for hf: upload the folder to the Hugging Face hub, with the token of `hf auth login`",
    )
    parser.add_argument(
        "--private", action="store_true", help="with --push: make a new repository private"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the folder or file and print its path."""
    check_flags(arguments)
    if arguments.format == "checkpoint":
        return export_rounded(arguments)
    from tinylm.checkpoint.load import holds_adapter
    from tinylm.interchange.gguf import export_gguf
    from tinylm.interchange.hf_export import export_hf
    from tinylm.interchange.hub_push import require_push

    if arguments.push is not None:
        require_push(arguments.push)
    documents = documents_of_text(arguments.text)
    is_adapter = holds_adapter(arguments.ckpt)
    if arguments.merge and not is_adapter:
        problem = f"{arguments.ckpt} holds a whole model, not an adapter"
        raise UserError("--merge", problem, "Remove --merge")
    if is_adapter and not arguments.merge:
        return export_adapter_folder(arguments)
    if arguments.format == "hf":
        exported = export_hf(arguments.ckpt, arguments.out)
        log_check(exported, "f32")
    else:
        # OUT without .gguf is a folder; the file in it is named after the checkpoint and its type.
        file = arguments.out
        if file.suffix != ".gguf":
            dtype = "" if arguments.dtype == "f32" else f"-{arguments.dtype}"
            file = file / f"{arguments.ckpt.stem}{dtype}.gguf"
        exported = export_gguf(arguments.ckpt, file, dtype=arguments.dtype)
        log_check(exported, arguments.dtype)
        if arguments.dtype != "f32":
            log_rounding_cost(arguments, exported, documents)
    log_next(exported, arguments.format)
    push(arguments)
    print(printable(exported.path))
    return 0


def push(arguments: argparse.Namespace) -> None:
    """Upload the folder that was written, if that was asked for."""
    from tinylm.interchange.hub_push import push_folder

    if arguments.push is not None:
        address = push_folder(arguments.out, arguments.push, private=arguments.private)
        logger.info("pushed to %s", address)


def check_flags(arguments: argparse.Namespace) -> None:
    """Raise a UserError for a flag that the format does not have."""
    from tinylm.interchange.gguf_types import NUMBER_TYPES

    dtype = arguments.dtype
    if dtype not in NUMBER_TYPES:
        raise UserError("--dtype", f"must be one of {', '.join(NUMBER_TYPES)}, got {dtype}")
    if arguments.format != "gguf" and dtype != "f32":
        fix = "Remove it, or give --format gguf"
        raise UserError("--dtype", "only valid for --format gguf", fix)
    if dtype == "f32" and arguments.text is not None:
        fix = "Remove it, or give for example --format gguf --dtype q8_0"
        raise UserError("--text", "only valid for a GGUF file with rounded weights", fix)
    if arguments.format != "hf" and arguments.push is not None:
        raise UserError("--push", "only valid for --format hf", "Remove it, or remove --format")
    if arguments.private and arguments.push is None:
        raise UserError("--private", "only valid with --push", "Remove it, or give --push")
    if arguments.format != "checkpoint" and arguments.weights != "fp32":
        fix = "Give --format checkpoint, or remove it"
        raise UserError("--weights", "only valid for --format checkpoint", fix)


def log_check(exported: "Exported", dtype: str) -> None:
    """Log how near the exported model is to ours."""
    logger.info(
        "%s, %s: read back%s, its logits differ from ours%s by %.1e",
        exported.model_type,
        dtype,
        "" if has_experts(exported) else " by transformers",
        "" if dtype == "f32" else " with weights rounded alike",
        exported.difference,
    )


def has_experts(exported: "Exported") -> bool:
    """Whether it is a mixture of experts in GGUF, which transformers does not read."""
    return exported.gguf_config is not None and exported.gguf_config.moe is not None


def log_next(exported: "Exported", kind: str) -> None:
    """Log the commands that load the exported model."""
    if exported.tokenizer_class != "AutoTokenizer":
        logger.info(
            "note: load its tokenizer with %s; "
            "AutoTokenizer pre-tokenizes differently for every %s",
            exported.tokenizer_class,
            exported.model_type,
        )
    if kind == "gguf":
        name = shlex.quote(exported.path.stem)
        recipe = shlex.quote(str(exported.path.with_suffix(".Modelfile")))
        label = "next" if has_experts(exported) else "Ollama"
        logger.info("%s: ollama create %s -f %s", label, name, recipe)
    if not has_experts(exported):
        logger.info("next: python -c %s", shlex.quote(loading_code(exported, kind)))


def log_rounding_cost(
    arguments: argparse.Namespace, exported: "Exported", documents: list[str]
) -> None:
    """Log the bits per byte of the exact model and of the one in a GGUF file, on the documents of
    --text, if there are any.
    """
    from tinylm.checkpoint.load import load_model
    from tinylm.generate.engine import Engine
    from tinylm.generate.weights import (
        N_TOKENS,
        RoundingCost,
        bits_per_byte,
        held_out_texts,
        own_texts,
    )
    from tinylm.interchange.gguf import read_gguf

    config = exported.gguf_config
    assert config is not None
    loaded = load_model(arguments.ckpt)
    engine = Engine(loaded.model, loaded.tokenizer)
    name = arguments.text or f"its validation text ({loaded.config.data.dataset})"
    documents = documents or validation_documents(loaded)
    texts = held_out_texts(documents, loaded.tokenizer, config.max_seq_len)
    if not texts:
        name, texts = "its own text", own_texts(engine, min(N_TOKENS, config.max_seq_len))
    rounded = Engine(read_gguf(exported.path, config), loaded.tokenizer)
    cost = RoundingCost(bits_per_byte(engine, texts), bits_per_byte(rounded, texts))
    logger.info(
        "%s: %s, bits per byte of %s %.4f -> %.4f (%+.4f)",
        *(arguments.dtype, size(exported.path.stat().st_size), name),
        *(cost.before, cost.after, cost.rise),
    )


def documents_of_text(file: str | None) -> list[str]:
    """The first documents of --text; none if it is not given."""
    from tinylm.text.named_sources import sources_named

    if file is None:
        return []
    with rename_settings({"--data": "--text"}):
        documents = list(islice(sources_named([file]).documents(), 100))
    if not documents:
        raise UserError(("--text", file), "no documents, only blank lines or nothing at all")
    return documents


def validation_documents(loaded: "Loaded") -> list[str]:
    """The first validation documents of the run, if they are files on this machine, else none."""
    from tinylm.text.data_source import data_sources
    from tinylm.text.sources import LocalFiles

    if loaded.info.stage != "pretrain" or loaded.info.step == 0:
        return []
    try:
        sources = data_sources(loaded.config.data, "val", loaded.config.training.seed)
        splits = [source.split for source in sources]
        if not all(split and isinstance(split.text_source, LocalFiles) for split in splits):
            return []
        return [text for split in splits for text in islice(split.documents(), 100)]
    except UserError:  # the data are elsewhere, or have changed
        return []


def export_rounded(arguments: argparse.Namespace) -> int:
    """Write the checkpoint with the weights alone and print its path."""
    from tinylm.generate.rounded_checkpoint import export_checkpoint

    weights, max_rise = arguments.weights, arguments.max_bpb_rise
    written = export_checkpoint(arguments.ckpt, arguments.out, weights, max_rise=max_rise)
    logger.info(
        "%s: %s, its weights in fp32 %s; %s: %s",
        *(arguments.ckpt, size(arguments.ckpt.stat().st_size), size(written.bytes_before)),
        *(arguments.out, size(written.bytes)),
    )
    logger.info('next: python infer.py --ckpt %s --prompt "Once"', shlex.quote(str(arguments.out)))
    print(printable(arguments.out))
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
    push(arguments)
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
