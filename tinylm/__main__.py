"""The library's commands: `python -m tinylm COMMAND`, or `python -m tinylm COMMAND --help`.

A command is a module of tinylm/cli: `SUMMARY` is its line in the list of commands,
`add_arguments(parser)` declares its flags, and `run(arguments)` does the work, prints the results
to stdout and returns the exit code. To add a command, write such a module and enter it below.
"""

import sys
from collections.abc import Sequence

from tinylm.cli import (
    config_docs,
    doctor,
    encode,
    experiments,
    export,
    import_model,
    plot,
    tokenizer,
)
from tinylm.cli.program import Parser, run_program

COMMANDS = {
    "config-reference": config_docs,
    "tokenizer": tokenizer,
    "encode": encode,
    "export": export,
    "import": import_model,
    "plot": plot,
    "doctor": doctor,
    "experiments": experiments,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = Parser(
        prog="python -m tinylm",
        usage="python -m tinylm COMMAND [flags]",
        description="Commands of the Tiny Transformer library.",
    )
    subparsers = parser.add_subparsers(
        prog="python -m tinylm",
        metavar="command",
        required=True,
    )
    for name, module in COMMANDS.items():
        command = subparsers.add_parser(name, help=module.SUMMARY)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    return run_program(lambda: arguments.run(arguments), debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
