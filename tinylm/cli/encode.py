"""`python -m tinylm encode`: encode a corpus once, into a token file that data.dataset names."""

import argparse
import logging
import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tinylm.cli.text_flags import (
    TEXT_FLAGS,
    add_processes_flag,
    add_text_flags,
    add_tokenizer_flag,
    require_positive,
    text_source,
)
from tinylm.common.console import progress_bar
from tinylm.common.errors import UserError, printable, rename_settings

if TYPE_CHECKING:
    from tinylm.tokens.encode import EncodeSpec
    from tinylm.tokens.token_file import TokenFile

logger = logging.getLogger(__name__)

SUMMARY = "encode a corpus into a token file"
# Flags in place of the settings that errors name (`calling`).
ENCODE_FLAGS = TEXT_FLAGS | {"tokenizer.path": "--tokenizer"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.usage = (
        "python -m tinylm encode --data 'corpus/*.txt' --tokenizer TOKENIZER --out FILE.bin [flags]"
    )
    parser.description = (
        "Encode a corpus once, into a token file for data.dataset: with all cores, "
        "in document order, resumable."
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """\
for example:
  python -m tinylm encode --data 'corpus/*.txt' --tokenizer tokenizers/mine --out data/mine-train.bin --processes 8
  python -m tinylm encode --data hf:allenai/c4:en --docs 1000000 --tokenizer gpt2 --out data/c4.bin
"""
    add_text_flags(
        parser, separator="text between documents in a .txt file (default: each line is a document)"
    )
    add_tokenizer_flag(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.bin", help="the new token file"
    )
    add_processes_flag(parser, "number of processes; the file is the same")
    parser.add_argument(
        "--max-doc-len", type=int, metavar="N", help="truncate documents to N tokens"
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.add_argument(
        "--format",
        choices=("bin", "npy", "bare"),
        default="bin",
        help="npy: also write the ids as a plain NumPy array, FILE.npy (as --out FILE.npy does); "
        "bare: also as numbers without a header, FILE.ids.bin (for data.token_dtype)",
    )


@rename_settings(ENCODE_FLAGS)
def run(arguments: argparse.Namespace) -> int:
    """Write the token file, report its content, and print its path."""
    from tinylm.common.files import locked
    from tinylm.text.sources import BIN, NPY
    from tinylm.tokens.id_arrays import write_ids
    from tinylm.tokens.run_files import notes_on_text

    require_positive(arguments, "processes", "docs", "max_doc_len")
    if arguments.out.suffix == NPY:  # the array is written beside a token file
        arguments.out, arguments.format = arguments.out.with_suffix(BIN), "npy"
    path = arguments.out
    array = array_path(arguments)
    if path.suffix != BIN:
        problem = f"the name of a token file must end with {BIN}, or {NPY} for an array beside it"
        raise UserError(("--out", path), problem, "Choose such a name")
    spec = encode_spec(arguments)
    with locked(
        path, "--out", on_wait=lambda: logger.info("waiting: another process writes %s", path)
    ):
        file = existing_or_encoded(arguments, spec)
        if arguments.format != "bin" and not array_exists(array, file):
            write_ids(file, array, "--out")
    report_content(file)
    for note in notes_on_text(
        spec.split.text_source.name, file, spec.tokenizer, spec.separator, "--separator"
    ):
        logger.info("%s", note)
    logger.info("next: %s", training_command(path, arguments.tokenizer))
    if arguments.format != "bin":
        print(printable(array))
    print(printable(path))
    return 0


def array_path(arguments: argparse.Namespace) -> Path:
    """The file beside the token file that has its ids alone, of --format npy and bare."""
    from tinylm.text.sources import NPY

    end = NPY if arguments.format == "npy" else ".ids.bin"
    return arguments.out.with_suffix(end)


def encode_spec(arguments: argparse.Namespace) -> "EncodeSpec":
    """What the token file is made from."""
    from tinylm.text.sources import Split
    from tinylm.tokenizer.factory import named_tokenizer
    from tinylm.tokens.encode import EncodeSpec

    source = text_source(arguments, again="The same command with --resume continues from there.")
    return EncodeSpec(
        Split("train", source, None, arguments.docs),
        named_tokenizer(arguments.tokenizer),
        arguments.text_field,
        arguments.separator,
        arguments.max_doc_len,
        f"{printable(source.name)}:",
    )


def existing_or_encoded(arguments: argparse.Namespace, spec: "EncodeSpec") -> "TokenFile":
    """The token file at --out: the existing one if it is what the flags ask for, else a new one."""
    from tinylm.tokens.encode import encode_file, finished_file
    from tinylm.tokens.token_file import TokenFile
    from tinylm.tokens.token_file_writer import writer_folder

    path = arguments.out
    array = array_path(arguments)
    file = finished_file(path, spec)
    if file is not None:
        logger.info("already complete: %s", path)
        return file
    # Checked before the hours of work, not after them.
    if arguments.format != "bin" and os.path.lexists(array):
        raise UserError(
            array, f"already exists, without {path}", "Delete it, or choose another --out"
        )
    if not arguments.resume and (writer_folder(path) / "state.json").exists():
        raise UserError(
            writer_folder(path),
            "holds the work of an interrupted run",
            "Continue it with the same command and --resume, or delete it to start again",
        )
    started = time.monotonic()
    try:  # from the first line on, so that Ctrl-C always names --resume
        logger.info(
            "encoding with %d processes, tokenizer %s (vocabulary %d)",
            arguments.processes,
            spec.tokenizer.fingerprint,
            spec.tokenizer.vocab_size,
        )
        with progress_bar() as on_progress:
            encode_file(
                path,
                spec,
                processes=arguments.processes,
                resume=arguments.resume,
                keep=True,
                setting="--out",
                on_progress=on_progress,
            )
    except KeyboardInterrupt:
        logger.info("interrupted; the same command with --resume continues from here")
        raise
    file = TokenFile.open(path)
    seconds = time.monotonic() - started
    megabytes = file.header.text_bytes / 1e6
    logger.info(
        "encoded %.1f MB of text in %.1f s, %.1f MB/s", megabytes, seconds, megabytes / seconds
    )
    return file


def array_exists(array: Path, file: "TokenFile") -> bool:
    """Whether the array exists and has the ids of the token file.

    Raises:
        UserError: it has other content.
    """
    from tinylm.tokens.id_arrays import holds_ids

    if not os.path.lexists(array):
        return False
    if not holds_ids(array, file):
        raise UserError(
            array,
            f"already exists, with other ids than {file.path}",
            "Delete it, or choose another --out",
        )
    logger.info("already complete: %s", array)
    return True


def report_content(file: "TokenFile") -> None:
    """Log what is in a token file."""
    header = file.header
    n_text_tokens = header.count - header.documents  # without the EOS of each document
    logger.info(
        "%s tokens (%s) of %s documents, %.3f bytes per token",
        f"{header.count:,}",
        header.dtype,
        f"{header.documents:,}",
        header.text_bytes / max(n_text_tokens, 1),
    )
    logger.info("first ten ids: %s", " ".join(map(str, file.tokens[:10])))
    logger.info("last ten ids:  %s", " ".join(map(str, file.tokens[-10:])))


def training_command(path: Path, tokenizer: str) -> str:
    """A command that trains on the token file, with checkpoints in a folder of its own."""
    settings = [f"data.dataset={path}"]
    if tokenizer == "byte":
        settings += ["tokenizer.kind=byte", "tokenizer.vocab_size=null"]
    else:
        settings.append(f"tokenizer.path={tokenizer}")
    settings.append(f"training.checkpoint_dir=checkpoints/{path.stem}")
    return f"python train.py --config config_smoke.yaml {shlex.join(settings)}"
