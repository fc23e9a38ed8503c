"""One command for everything: `tinylm COMMAND`, or `python -m tinylm COMMAND`; with --help.

A command is a module of tinylm/cli: `SUMMARY` is its line in the list of commands,
`add_arguments(parser)` declares its flags, and `run(arguments)` does the work, prints the results
to stdout and returns the exit code. To add a command, write such a module and enter it below.
The programs, which are also typed as `python train.py`, are commands as they are.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from tinylm import __version__
from tinylm.cli import (
    arithmetic,
    config_docs,
    doctor,
    encode,
    experiments,
    export,
    import_model,
    new,
    plot,
    runs,
    select_answers,
    serve,
    tokenizer,
)
from tinylm.cli.data_rows import ShowRows
from tinylm.cli.program import Parser, run_program
from tinylm.cli.programs import Program
from tinylm.common.app_folder import INSTALLED, app_folder
from tinylm.common.console import COMMAND_VARIABLE

CHAT_HELP = {
    "prog": "python -m tinylm chat",
    "usage": "python -m tinylm chat [flags]",
    "description": "Chat with a fine-tuned model: one question per line. The flags are those of "
    "python infer.py, with --chat.",
}
GROUPS = {
    "start": {
        "new": new,
        "doctor": doctor,
    },
    "train": {
        "train": Program("train", "pretrain a model on text"),
        "finetune": Program("finetune", "teach a model to answer, or which answer is better"),
        "align": Program("align", "pretrain, fine-tune and align in one command"),
        "experiments": experiments,
    },
    "use": {
        "infer": Program("infer", "continue a prompt, or ask a fine-tuned model"),
        "chat": Program("infer", "chat with a fine-tuned model", ("--chat",), CHAT_HELP),
        "serve": serve,
        "export": export,
        "import": import_model,
    },
    "measure": {
        "eval": Program("evaluate_checkpoints", "rank models on cases and tasks"),
        "eval-val": Program("eval_val", "score checkpoints on validation data"),
        "list": Program("list", "list checkpoints"),
        "runs": runs,
        "plot": plot,
    },
    "data": {
        "data": ShowRows(
            "data", "show the rows of a config; data stats and data clean for a corpus"
        ),
        "tokenizer": tokenizer,
        "encode": encode,
        "select": select_answers,
        "arithmetic": arithmetic,
    },
    "reference": {
        "config-reference": config_docs,
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = words[:1] == ["--debug"]
    chosen = words[debug : debug + 1]
    command = COMMANDS.get(*chosen) if chosen else None
    if isinstance(command, Program):
        return command.main([*words[:debug], *words[debug + 1 :]])
    arguments = make_parser(chosen).parse_args(words)
    return run_program(lambda: arguments.run(arguments), debug=arguments.debug)


def make_parser(chosen: Sequence[str]) -> Parser:
    """The command line, with the flags of the command that was chosen, if any."""
    parser = Parser(
        prog="python -m tinylm",
        usage="python -m tinylm COMMAND [flags]",
        description="Tiny Transformer: train, use and measure language models.",
        epilog=list_commands(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tinylm {__version__}")
    subparsers = parser.add_subparsers(
        prog="python -m tinylm", metavar="command", required=True, help=argparse.SUPPRESS
    )
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name)
        if [name] == chosen:
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    return parser


def list_commands() -> str:
    """The commands in their groups, a line each."""
    width = max(map(len, COMMANDS))
    lines = []
    for group, commands in GROUPS.items():
        lines.append(f"{group}:")
        lines += [f"  {name:{width}}  {command.SUMMARY}" for name, command in commands.items()]
    return "\n".join(lines)


def console_script() -> int:
    """The installed command `tinylm`, whose messages name other commands in its form."""
    os.environ[COMMAND_VARIABLE] = "tinylm"
    return main()


if __name__ == "__main__":
    if app_folder().name == INSTALLED:  # there is no train.py to type
        os.environ.setdefault(COMMAND_VARIABLE, "python -m tinylm")
    sys.exit(main())
