"""The library's own commands: `python -m tinylm COMMAND`.

A command is a function `add_NAME(commands)` that declares its arguments and a function `NAME(arguments) -> int` that
imports what it needs, makes one call and prints. Add the first to `main`.
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylm.cli.program import Parser, run_program
from tinylm.common.console import progress_bar, say
from tinylm.common.errors import UserError, calling, printable, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

    from tinylm.interchange.hf_export import Exported
    from tinylm.text.sources import Together
    from tinylm.tokenizer.base import Tokenizer
    from tinylm.tokens.encode import Recipe
    from tinylm.tokens.token_file import TokenFile

# Neighbouring tokens differ; all five are readable on black and on white.
TOKEN_STYLES = (
    "black on bright_cyan",
    "black on bright_yellow",
    "black on bright_green",
    "black on bright_magenta",
    "black on white",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    parser = Parser(
        prog="python -m tinylm", description="Commands of the Tiny Transformer library."
    )
    # The commands are plain parsers: --debug stands before the command.
    commands = parser.add_subparsers(
        metavar="command", required=True, parser_class=argparse.ArgumentParser
    )
    add_config_reference(commands)
    add_tokenizer(commands)
    add_encode(commands)
    add_export(commands)
    add_import(commands)
    add_plot(commands)
    add_doctor(commands)
    add_experiments(commands)
    arguments = parser.parse_args(argv)
    return run_program(lambda: arguments.run(arguments), debug=arguments.debug)


def add_config_reference(commands: Any) -> None:
    """Declare `config-reference`."""
    summary = "write the reference of all settings and their JSON schema for editors"
    command = commands.add_parser(
        "config-reference", help=summary, description=f"{summary[0].upper()}{summary[1:]}."
    )
    command.add_argument(
        "--folder", type=Path, default=Path("docs"), help="where the two files are (default: docs)"
    )
    command.add_argument(
        "--check",
        action="store_true",
        help="write nothing; fail if a file does not match the settings",
    )
    command.set_defaults(run=config_reference)


def config_reference(arguments: argparse.Namespace) -> int:
    """Write, or check, the files that `tinylm/config/docs.py` makes."""
    from tinylm.config.docs import reference_files

    for name, text in reference_files().items():
        path = arguments.folder / name
        try:
            if not arguments.check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8", newline="\n")
            stale = path.read_bytes() != text.encode()
        except OSError as error:
            raise UserError(
                f"{printable(path)}: {error.strerror}. Give the folder of the reference with --folder."
            ) from None
        if stale:
            raise UserError(
                f"{printable(path)}: does not match the settings in tinylm/config/schema.py. Write it again: python -m tinylm config-reference."
            )
        print(path)
    return 0


def add_tokenizer(commands: Any) -> None:
    """Declare `tokenizer train`, `tokenizer compare` and `tokenizer show`."""
    command = commands.add_parser(
        "tokenizer", help="learn a tokenizer, compare some, show what one makes of a text"
    )
    actions = command.add_subparsers(metavar="action", required=True)

    summary = "Learn byte-level BPE from text and write the files that transformers opens too."
    plain = argparse.RawDescriptionHelpFormatter
    train = actions.add_parser(
        "train",
        help="learn one from text",
        description=summary,
        epilog=TRAIN_EXAMPLE,
        formatter_class=plain,
    )
    add_text_flags(
        train, separator="what divides documents in a .txt file (default: it is read as it stands)"
    )
    train.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="the new folder for the tokenizer"
    )
    train.add_argument(
        "--vocab-size",
        type=int,
        required=True,
        metavar="N",
        help="tokens, among them 256 bytes and the special ones",
    )
    special = "special tokens: the text is cut at them and no merge has one; the end of a text is the first, or one known for it (default: <|endoftext|>)"
    train.add_argument(
        "--special", nargs="+", default=["<|endoftext|>"], metavar="TOKEN", help=special
    )
    train.add_argument(
        "--pattern",
        choices=("gpt2", "gpt4"),
        default="gpt2",
        help="the words that merges stay within (default: gpt2)",
    )
    train.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="processes that count words; the result is the same (default: 1)",
    )
    train.set_defaults(run=tokenizer_train)

    summary = "How several tokenizers fit a text: bytes per token, how much of the vocabulary it uses, the longest tokens in it."
    compare = actions.add_parser("compare", help="how several fit a text", description=summary)
    compare.add_argument(
        "tokenizers",
        nargs="+",
        metavar="TOKENIZER",
        help="a folder, a Hugging Face name such as gpt2, or byte",
    )
    add_text_flags(
        compare,
        separator="what divides documents in a .txt file (default: it is read as it stands)",
    )
    compare.set_defaults(run=tokenizer_compare)

    show = actions.add_parser(
        "show",
        help="the tokens of a text",
        description="The tokens of a text, and their ids below.",
    )
    show.add_argument(
        "tokenizer", metavar="TOKENIZER", help="a folder, a Hugging Face name such as gpt2, or byte"
    )
    show.add_argument("text", help="the text")
    show.set_defaults(run=tokenizer_show)


TRAIN_EXAMPLE = """\
for example:
  python -m tinylm tokenizer train --data 'corpus/*.txt' --out tokenizers/mine --vocab-size 32000 --special '<|endoftext|>' '<|pad|>' --processes 8
"""


def add_text_flags(command: argparse.ArgumentParser, *, separator: str) -> None:
    """Declare the flags that say which text a command reads."""
    kinds = "files, folders or globs of .txt, .jsonl, .parquet, .gz; or hf:owner/name[:config[:split]], streamed from the hub"
    command.add_argument("--data", nargs="+", required=True, metavar="PATH", help=kinds)
    command.add_argument("--docs", type=int, metavar="N", help="stop after so many documents")
    command.add_argument(
        "--text-field",
        default="text",
        metavar="KEY",
        help="column or key that holds the text (default: text)",
    )
    command.add_argument("--separator", metavar="TEXT", help=separator)


# What errors call by a setting's name, and the commands by a flag.
TEXT_FLAGS = {
    "data.dataset": "--data", "data.text_field": "--text-field", "data.dataset_config": "the configuration", "data.split": "the split in --data",
}  # fmt: skip
TRAIN_FLAGS = TEXT_FLAGS | {"tokenizer.vocab_size": "--vocab-size", "special token": "--special"}
ENCODE_FLAGS = TEXT_FLAGS | {"tokenizer.path": "--tokenizer"}
SHOW_FLAGS = {"tokenizer.path": "TOKENIZER"}


def text_named(arguments: argparse.Namespace, *, again: str = "Try again.") -> "Together":
    """The text that the flags mean; `again` is what to do where the network fails."""
    from tinylm.text.sources import sources_named

    require_counts(arguments, "docs")
    if arguments.separator == "":
        raise UserError("--separator: is empty. Give the text that divides documents.")
    return sources_named(arguments.data, arguments.text_field, arguments.separator, again=again)


def require_counts(arguments: argparse.Namespace, *names: str) -> None:
    """UserError for a flag whose number is less than 1."""
    for name in names:
        value = vars(arguments)[name]
        if value is not None and value < 1:
            raise UserError(
                f"--{name.replace('_', '-')}: {value} is less than 1. Give a whole number from 1 on."
            )


@calling(TRAIN_FLAGS)
def tokenizer_train(arguments: argparse.Namespace) -> int:
    """Learn merges and write the tokenizer's files; their folder is printed."""
    from tinylm.tokenizer.bpe import Rules, check_request, learn_bpe, require_writable

    require_counts(arguments, "processes")
    rules = Rules(arguments.pattern, tuple(arguments.special))
    check_request(arguments.vocab_size, rules)
    require_writable(arguments.out, "--out")
    source = text_named(arguments)
    with progress_bar() as progress:
        bpe = learn_bpe(
            source,
            arguments.vocab_size,
            rules,
            docs=arguments.docs,
            processes=arguments.processes,
            progress=progress,
        )
    bpe.save(arguments.out, "--out")
    if bpe.vocab_size < arguments.vocab_size:
        say(
            f"vocabulary: {bpe.vocab_size} tokens instead of {arguments.vocab_size}: every word of this text is one token already"
        )
    say(f"learned {len(bpe.merges)} merges; end of text {bpe.eos}, padding {bpe.pad or bpe.eos}")
    say(
        f"next: python -m tinylm tokenizer show {arguments.out} 'Some text', or tokenizer.path={arguments.out} in a config"
    )
    print(printable(arguments.out))
    return 0


@calling(TEXT_FLAGS)
def tokenizer_compare(arguments: argparse.Namespace) -> int:
    """Print a table with a row for each tokenizer that can be had; 2 if one cannot."""
    from rich.table import Table
    from rich.text import Text

    from tinylm.text.source_chunks import word_chunks
    from tinylm.tokenizer.hf import Fit

    source = text_named(arguments)
    table = Table("tokenizer", title=Text(printable(source.name)))
    for column in ("vocabulary", "tokens", "bytes per token", "used"):
        table.add_column(column, justify="right")
    table.add_column("longest tokens", overflow="fold")
    found, problems = tokenizers_named(arguments.tokenizers)
    for name, tokenizer in found.items():
        fit = Fit.of(
            tokenizer,
            (text for chunk in word_chunks(source, docs=arguments.docs) for text in chunk.texts()),
        )
        if not fit.n_tokens:
            raise UserError(f"{printable(source.name)}: no text. Give a file with text.")
        used = f"{fit.n_used:,} ({fit.n_used / tokenizer.vocab_size:.0%})"
        longest = Text("  ".join(f"'{tokenizer.token_text(id)}'" for id in fit.longest))
        table.add_row(
            Text(printable(name)),
            f"{tokenizer.vocab_size:,}",
            f"{fit.n_tokens:,}",
            f"{fit.n_bytes / fit.n_tokens:.3f}",
            used,
            longest,
        )
    if found:
        results().print(table)
    for problem in problems:
        say(f"error: {problem}")
    return 2 if problems else 0


def tokenizers_named(names: Sequence[str]) -> tuple[dict[str, "Tokenizer"], list[str]]:
    """The tokenizers that could be opened, by name, and what was wrong with each of the others."""
    from tinylm.tokenizer.factory import named_tokenizer

    found, problems = {}, []
    for name in names:
        try:
            with calling(SHOW_FLAGS):
                found[name] = named_tokenizer(name)
        except UserError as problem:
            problems.append(str(problem))
    return found, problems


@calling(SHOW_FLAGS)
def tokenizer_show(arguments: argparse.Namespace) -> int:
    """Print the tokens of a text with a bar between them, their ids, and how many they are."""
    from rich.text import Text

    from tinylm.tokenizer.factory import named_tokenizer

    tokenizer = named_tokenizer(arguments.tokenizer)
    ids = tokenizer.encode(arguments.text)
    styles = [TOKEN_STYLES[place % len(TOKEN_STYLES)] for place in range(len(ids))]
    console = results()
    for divider, pieces in (("|", map(tokenizer.token_text, ids)), (" ", map(str, ids))):
        console.print(
            Text(divider).join(
                Text(piece, style) for piece, style in zip(pieces, styles, strict=True)
            ),
            soft_wrap=True,
        )
    n_bytes = len(arguments.text.encode())
    console.print(
        f"{len(ids)} tokens, {n_bytes} bytes"
        + (f", {n_bytes / len(ids):.2f} bytes per token" if ids else ""),
        highlight=False,
    )
    return 0


def add_encode(commands: Any) -> None:
    """Declare `encode`."""
    summary = "Encode a corpus once, into a token file that data.dataset names: by all cores, in document order, resumable."
    plain = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(
        "encode",
        help="make a token file of a corpus",
        description=summary,
        epilog=ENCODE_EXAMPLE,
        formatter_class=plain,
    )
    add_text_flags(
        command, separator="what divides documents in a .txt file (default: each line is one)"
    )
    command.add_argument(
        "--tokenizer",
        required=True,
        metavar="TOKENIZER",
        help="a folder, a Hugging Face name such as gpt2, or byte",
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="FILE.bin", help="the new token file"
    )
    command.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="the file is the same (default: one a core)",
    )
    command.add_argument(
        "--max-doc-len", type=int, metavar="N", help="tokens after which a document is cut"
    )
    command.add_argument(
        "--resume", action="store_true", help="go on with what an interrupted run left"
    )
    command.add_argument(
        "--format",
        choices=("bin", "npy"),
        default="bin",
        help="npy: also write a plain NumPy array of the ids, FILE.npy",
    )
    command.set_defaults(run=encode)


ENCODE_EXAMPLE = """\
for example:
  python -m tinylm encode --data 'corpus/*.txt' --tokenizer tokenizers/mine --out data/mine-train.bin --processes 8
  python -m tinylm encode --data hf:allenai/c4:en --docs 1000000 --tokenizer gpt2 --out data/c4.bin
"""


@calling(ENCODE_FLAGS)
def encode(arguments: argparse.Namespace) -> int:
    """Write the token file, tell what is in it, and print its path."""
    from tinylm.text.sources import NPY
    from tinylm.tokens.encode import notes_on_text
    from tinylm.tokens.token_file_writer import locked, write_npy

    check_encode(arguments)
    path, array = arguments.out, arguments.out.with_suffix(NPY)
    recipe = encode_recipe(arguments)
    with locked(
        path, "--out", lambda: say(f"waiting: another process is making {printable(path)}")
    ):
        file = finished_or_encoded(arguments, recipe)
        if arguments.format == "npy" and not array_is_there(array, file):
            write_npy(file, array, "--out")
    tell_content(file)
    for note in notes_on_text(
        recipe.split.source.name, file, recipe.tokenizer, recipe.separator, "--separator"
    ):
        say(note)
    tokenizer = (
        ["tokenizer.kind=byte", "tokenizer.vocab_size=null"]
        if arguments.tokenizer == "byte"
        else [f"tokenizer.path={arguments.tokenizer}"]
    )
    settings = [
        f"data.dataset={path}",
        *tokenizer,
        f"training.checkpoint_dir=checkpoints/{path.stem}",
    ]  # beside a model with another tokenizer
    say(f"next: python train.py --config config_smoke.yaml {shlex.join(settings)}")
    if arguments.format == "npy":
        print(printable(array))
    print(printable(path))
    return 0


def finished_or_encoded(arguments: argparse.Namespace, recipe: "Recipe") -> "TokenFile":
    """The token file at --out: the one that is there, where it is what was asked for, or a new one."""
    from tinylm.text.sources import NPY
    from tinylm.tokens.encode import encode_file, finished_file
    from tinylm.tokens.token_file import TokenFile
    from tinylm.tokens.token_file_writer import draft_folder

    path = arguments.out
    file = finished_file(path, recipe)
    if file is not None:
        say(f"complete already: {printable(path)}")
        return file
    if arguments.format == "npy" and os.path.lexists(
        path.with_suffix(NPY)
    ):  # said before the hours of work, not after them
        raise UserError(
            f"{printable(path.with_suffix(NPY))}: is there already, without {printable(path)}. Delete it, or choose another --out."
        )
    if not arguments.resume and (draft_folder(path) / "state.json").exists():
        left = printable(draft_folder(path))
        raise UserError(
            f"{left}: what an interrupted run has done. Go on with it: the same command and --resume; or delete it to begin again."
        )
    started = time.monotonic()
    try:
        say(
            f"encoding with {arguments.processes} processes, tokenizer {recipe.tokenizer.fingerprint} (vocabulary {recipe.tokenizer.vocab_size})"
        )
        with progress_bar() as progress:
            encode_file(
                path,
                recipe,
                processes=arguments.processes,
                resume=arguments.resume,
                keep=True,
                place="--out",
                progress=progress,
            )
    except KeyboardInterrupt:
        say("interrupted; the same command with --resume goes on from here")
        raise
    file = TokenFile.open(path)
    tell_speed(file, time.monotonic() - started)
    return file


def array_is_there(array: Path, file: "TokenFile") -> bool:
    """Whether FILE.npy is there and has the ids of the token file.

    Raises:
        UserError: something else is there.
    """
    from tinylm.tokens.token_file_writer import holds_ids

    if not os.path.lexists(array):
        return False
    if not holds_ids(array, file):
        raise UserError(
            f"{printable(array)}: is there already, and has other ids than {printable(file.path)}. Delete it, or choose another --out."
        )
    say(f"complete already: {printable(array)}")
    return True


def check_encode(arguments: argparse.Namespace) -> None:
    """UserError for arguments that cannot be."""
    from tinylm.text.sources import BIN

    require_counts(arguments, "processes", "docs", "max_doc_len")
    if arguments.out.suffix != BIN:
        raise UserError(
            f"--out: {printable(arguments.out)}: a token file's name ends with {BIN}. Choose such a name."
        )


def encode_recipe(arguments: argparse.Namespace) -> "Recipe":
    """What the token file is made from."""
    from tinylm.text.splits import Split
    from tinylm.tokenizer.factory import named_tokenizer
    from tinylm.tokens.encode import Recipe

    source = text_named(arguments, again="The same command with --resume goes on from there.")
    tokenizer = named_tokenizer(arguments.tokenizer)
    label = f"{printable(source.name)}:"
    return Recipe(
        Split("train", source, None, arguments.docs),
        tokenizer,
        arguments.text_field,
        arguments.separator,
        arguments.max_doc_len,
        label,
    )


def tell_speed(file: "TokenFile", seconds: float) -> None:
    """How long it took."""
    say(
        f"encoded {file.header.text_bytes / 1e6:.1f} MB of text in {seconds:.1f} s, {file.header.text_bytes / 1e6 / seconds:.1f} MB/s"
    )


def tell_content(file: "TokenFile") -> None:
    """What is in a token file."""
    header = file.header
    text_tokens = header.count - header.documents  # without the EOS of each document
    say(
        f"{header.count:,} tokens ({header.dtype}) of {header.documents:,} documents, {header.text_bytes / max(text_tokens, 1):.3f} bytes per token"
    )
    say(f"first ten ids: {' '.join(map(str, file.tokens[:10]))}")
    say(f"last ten ids:  {' '.join(map(str, file.tokens[-10:]))}")


def add_export(commands: Any) -> None:
    """Declare `export`."""
    summary = "write a checkpoint as a Hugging Face folder or a GGUF file, an adapter as a folder for peft"
    command = commands.add_parser(
        "export",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}; a model's logits are compared with ours first.",
    )
    command.add_argument("ckpt", type=Path, metavar="CKPT", help="the checkpoint")
    command.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="the new folder for hf; for gguf the new file NAME.gguf, or a folder for it",
    )
    kinds = "hf: for transformers, or peft if it is an adapter; gguf: one file for llama.cpp and its like (default: hf)"
    command.add_argument("--format", choices=("hf", "gguf"), default="hf", help=kinds)
    command.add_argument(
        "--floats",
        choices=("f32", "f16"),
        default="f32",
        help="for gguf: bits of its matrices (default: f32)",
    )
    command.add_argument(
        "--merge",
        action="store_true",
        help="of an adapter: write the whole model that it makes with its base",
    )
    command.set_defaults(run=export)


def export(arguments: argparse.Namespace) -> int:
    """Write the folder or file; its path is printed."""
    from tinylm.checkpoint.format import holds_adapter
    from tinylm.interchange.gguf import export_gguf
    from tinylm.interchange.hf_export import export_hf

    if arguments.format == "hf" and arguments.floats != "f32":
        raise UserError(
            "--floats: a Hugging Face folder is written in f32. Leave --floats out, or give --format gguf."
        )
    adapter = holds_adapter(arguments.ckpt)
    if arguments.merge and not adapter:
        raise UserError(
            f"--merge: {printable(arguments.ckpt)} holds a whole model and no adapter. Leave --merge out."
        )
    if adapter and not arguments.merge:
        return export_adapter_alone(arguments)
    if arguments.format == "hf":
        written = export_hf(arguments.ckpt, arguments.out)
    else:
        written = export_gguf(
            arguments.ckpt, gguf_file(arguments.ckpt, arguments.out), floats=arguments.floats
        )
    say(
        f"{written.model_type}, {arguments.floats}: read back by transformers, its logits differ from ours by {written.difference:.1e}"
    )
    if written.tokenizer_class != "AutoTokenizer":
        say(
            f"note: load its tokenizer with {written.tokenizer_class}; AutoTokenizer cuts words in its own way for every {written.model_type}"
        )
    say(f"next: python -c {shlex.quote(code_that_loads(written, arguments.format))}")
    print(printable(written.path))
    return 0


def gguf_file(ckpt: Path, out: Path) -> Path:
    """OUT, or in the folder OUT, which a name without .gguf means, a file that is called as the checkpoint is."""
    return out if out.suffix == ".gguf" else out / f"{ckpt.stem}.gguf"


def export_adapter_alone(arguments: argparse.Namespace) -> int:
    """Write the folder for peft; its path is printed."""
    from tinylm.interchange.hf_export import export_adapter

    if arguments.format == "gguf":
        raise UserError(
            "--format gguf: an adapter alone is written for peft. Give --merge for the whole model, or leave --format out."
        )
    out = export_adapter(arguments.ckpt, arguments.out)
    base = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))[
        "base_model_name_or_path"
    ]
    say(f"the adapter alone, for peft, of {printable(base)}; --merge writes the whole model")
    say(
        f"next: in Python, peft.PeftModel.from_pretrained(model, {str(out)!r}), where model is that one"
    )
    print(printable(out))
    return 0


def code_that_loads(written: "Exported", kind: str) -> str:
    """Python that shows what was written to work."""
    if kind == "hf" and written.tokenizer_class == "AutoTokenizer":
        return f'from transformers import pipeline; print(pipeline("text-generation", "{written.path}")("Once"))'
    if kind == "hf":
        tokenizer = f'tokenizer=T.from_pretrained("{written.path}")'
        return f'from transformers import pipeline, {written.tokenizer_class} as T; print(pipeline("text-generation", "{written.path}", {tokenizer})("Once"))'
    settings = "".join(f", {name}={value}" for name, value in written.needs.items())
    return f'from transformers import AutoModelForCausalLM as M; print(M.from_pretrained("{written.path.parent}", gguf_file="{written.path.name}"{settings}))'


def add_import(commands: Any) -> None:
    """Declare `import`."""
    summary = "turn a Hugging Face model into a checkpoint"
    kinds = "GPT-2, Llama, Mistral, Mixtral, Qwen2 or Qwen3, from safetensors"
    about = f"{summary[0].upper()}{summary[1:]}: {kinds}; its logits are compared with transformers' first."
    command = commands.add_parser("import", help=summary, description=about)
    command.add_argument(
        "name",
        metavar="NAME_OR_FOLDER",
        help="a folder with config.json and model.safetensors, or a Hugging Face name such as gpt2",
    )
    command.add_argument("out", type=Path, metavar="OUT.ckpt", help="the new checkpoint")
    command.set_defaults(run=import_model)


def import_model(arguments: argparse.Namespace) -> int:
    """Write the checkpoint; its path is printed."""
    from tinylm.interchange.hf_import import import_hf

    imported = import_hf(arguments.name, arguments.out)
    say(
        f"{imported.model_type}, {imported.stored_as}, stored as fp32: its logits differ from transformers' by {imported.difference:.1e}"
    )
    path = shlex.quote(str(arguments.out))
    say(f"to train it further: training.init_from={path}, in train.py or finetune.py")
    say(f'next: python infer.py --ckpt {path} --prompt "Once"')
    print(printable(arguments.out))
    return 0


def add_plot(commands: Any) -> None:
    """Declare `plot`."""
    summary = "Curves of runs, or where the heads of a model look, as PNG files."
    command = commands.add_parser(
        "plot", help="curves of runs, attention maps", description=summary
    )
    command.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help="searched for metrics.csv and for checkpoints; several runs are overlaid",
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("plots"),
        metavar="FOLDER",
        help="where the pictures go (default: plots)",
    )
    command.add_argument(
        "--smooth",
        type=int,
        default=1,
        metavar="N",
        help="mean of N rows, the raw values behind (default: 1, off)",
    )
    command.add_argument("--text", action="store_true", help="draw in the terminal, write no file")
    command.add_argument(
        "--attention",
        action="store_true",
        help="attention maps of --ckpt on --prompt, layer by head",
    )
    command.add_argument(
        "--ckpt", type=Path, metavar="FILE", help="for --attention: the checkpoint"
    )
    command.add_argument("--prompt", metavar="TEXT", help="for --attention: the text that is read")
    command.set_defaults(run=plot)


def plot(arguments: argparse.Namespace) -> int:
    """Draw what was asked for; the paths of the pictures are printed."""
    if arguments.attention:
        return plot_attention(arguments)
    from tinylm.runs.plots import QUANTITIES, draw, find_runs, text_plot

    if not arguments.folders:
        raise UserError(
            "plot: no folder. Give the folders to look in: python -m tinylm plot checkpoints logs."
        )
    if arguments.smooth < 1:
        raise UserError(
            f"--smooth: {arguments.smooth} is less than 1. Give the number of rows that a mean is over."
        )
    runs = find_runs(arguments.folders)
    say("runs: " + ", ".join(f"{printable(run.name)} ({len(run.steps)} rows)" for run in runs))
    for quantity in QUANTITIES:
        if not any(len(run.curve(quantity)[0]) for run in runs):
            continue
        if arguments.text:
            print(text_plot(quantity, runs), end="\n\n")
        else:
            save_picture(
                draw(quantity, runs, smooth=arguments.smooth), arguments.out / f"{quantity}.png"
            )
    return 0


def plot_attention(arguments: argparse.Namespace) -> int:
    """Write the attention maps of a checkpoint on a text."""
    if arguments.ckpt is None or arguments.prompt is None:
        raise UserError(
            "plot --attention: it needs a model and a text. Give --ckpt FILE and --prompt TEXT."
        )
    from tinylm.checkpoint.load import load_model
    from tinylm.runs.plots import attention_maps, draw_attention

    loaded = load_model(arguments.ckpt)
    ids = loaded.tokenizer.encode(arguments.prompt)
    limit = loaded.config.model.max_seq_len
    if not 1 <= len(ids) <= limit:
        raise UserError(
            f"--prompt: {len(ids)} tokens, and this model reads 1 to {limit}. Give another text."
        )
    save_picture(
        draw_attention(
            attention_maps(loaded.model, ids), [loaded.tokenizer.token_text(id) for id in ids]
        ),
        arguments.out / "attention.png",
    )
    return 0


def save_picture(figure: "Figure", path: Path) -> None:
    """Write a figure and print its path."""
    with writing(path, "--out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    print(printable(path))


def add_doctor(commands: Any) -> None:
    """Declare `doctor`."""
    summary = "What this machine can do and what it lacks: versions, devices, precisions, disk, the hub, optional extras."
    commands.add_parser(
        "doctor", help="what this machine can do and what it lacks", description=summary
    ).set_defaults(run=doctor)


def doctor(arguments: argparse.Namespace) -> int:
    """Print a table of findings; 2 if something is missing that training needs."""
    from rich.table import Table
    from rich.text import Text

    from tinylm.planning.doctor import examine

    table, lacking = Table("what", "found", "to mend it"), []
    for finding in examine():
        style = "" if finding.mend is None else "red" if finding.needed else "yellow"
        table.add_row(finding.subject, Text(finding.found, style), finding.mend or "")
        lacking += [finding.subject] * (finding.mend is not None and finding.needed)
    results().print(table)
    if lacking:
        raise UserError(
            f"missing: {', '.join(lacking)}. Do what the table says, or: pip install -r requirements.txt."
        )
    say("everything that training needs is here; next: python train.py --config config_smoke.yaml")
    return 0


def add_experiments(commands: Any) -> None:
    """Declare `experiments`."""
    summary = "Train small models that differ in one setting, compare them, write a report; a step whose result is there is not run again."
    command = commands.add_parser(
        "experiments", help="compare choices of architecture and training", description=summary
    )
    phases = "smoke: a few steps of each path, and a report; pretrain, finetune: the runs; eval: tables, pictures and texts of them; all: these three"
    command.add_argument(
        "--phase",
        choices=("smoke", "pretrain", "finetune", "eval", "all"),
        required=True,
        help=phases,
    )
    command.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="train each of the compared models N times (default: 1)",
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("experiments"),
        metavar="FOLDER",
        help="where everything goes (default: experiments)",
    )
    command.set_defaults(run=experiments)


def experiments(arguments: argparse.Namespace) -> int:
    """Run the steps of a phase, then evaluate if it is asked for; the report's path is printed."""
    from tinylm.runs.experiments import plan_steps, run_steps

    if not 1 <= arguments.seeds <= 100:
        raise UserError(
            f"--seeds: {arguments.seeds} is not from 1 to 100. Give the number of runs of each model."
        )
    smoke = arguments.phase == "smoke"
    wanted = {"all": ("pretrain", "finetune"), "eval": ()}.get(arguments.phase, (arguments.phase,))
    steps = plan_steps(arguments.out, arguments.seeds)
    say(
        "device: each run says its own in its output; evaluation is on the cpu (the models are small)"
    )
    outcome = run_steps([step for step in steps if step.phase in wanted], say)
    if outcome.stopped:
        return outcome.stopped
    out = arguments.out / "smoke" if smoke else arguments.out
    if arguments.phase in ("smoke", "eval", "all"):
        from tinylm.runs.compare import evaluate

        print(
            printable(
                evaluate([step for step in steps if (step.phase == "smoke") == smoke], out, say)
            )
        )
    else:
        print(printable(arguments.out))
        say(
            f"next: python -m tinylm experiments --phase eval --seeds {arguments.seeds} --out {shlex.quote(str(arguments.out))}"
        )
    if outcome.failed:
        raise UserError(
            f"failed: {', '.join(outcome.failed)}. What they said is in {printable(out / 'output')}; the same command goes on from there."
        )
    return 0


def results() -> "Console":
    """Stdout for people: coloured on a terminal that wants it, plain and wide in a pipe."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=200)


if __name__ == "__main__":
    sys.exit(main())
