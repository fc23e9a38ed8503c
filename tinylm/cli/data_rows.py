"""`python -m tinylm data`: the first rows of a run, as training sees them; and the tools for a
corpus, `data stats` and `data clean`.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from tinylm.cli import data_clean, data_stats
from tinylm.cli.program import Parser, run_program
from tinylm.cli.programs import Program, load_program

# The tools, in modules as those of __main__.py.
TOOLS = {"stats": data_stats, "clean": data_clean}


class ShowRows(Program):
    """--show-rows of the program that a config is for, train.py or finetune.py, or a tool."""

    def main(self, words: Sequence[str]) -> int:
        """Print the rows and return the exit code; settings may be between the flags."""
        if words and words[0] in TOOLS:
            return run_tool(words[0], words[1:])
        arguments = make_parser().parse_intermixed_args(words)
        return run_program(lambda: run(arguments), debug=arguments.debug)


def run_tool(name: str, words: Sequence[str]) -> int:
    """Run a tool and return its exit code."""
    tool = TOOLS[name]
    parser = Parser(prog=f"python -m tinylm data {name}")
    tool.add_arguments(parser)
    arguments = parser.parse_args(words)
    return run_program(lambda: tool.run(arguments), debug=arguments.debug)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m tinylm data",
        usage="python -m tinylm data --config config.yaml [section.key=value ...] [--rows N]",
        description="Print the first rows that a config trains on, with the borders of documents "
        "and the tokens that are learned, as --show-rows of train.py and finetune.py does.",
        epilog="Tools for a corpus: "
        + "; ".join(f"data {name}: {tool.SUMMARY}" for name, tool in TOOLS.items())
        + ".",
    )
    parser.add_argument("--config", required=True, help="YAML file with the settings")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that override the file"
    )
    parser.add_argument(
        "--rows", type=int, default=3, metavar="N", help="number of rows (default: 3)"
    )
    parser.add_argument(
        "--of",
        choices=("train", "finetune"),
        help="whose rows (default: finetune if data.task, training.init_from or a section lora, "
        "dpo, reward_model or verifier is set, otherwise train)",
    )
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Let the program that the config is for print the rows."""
    from tinylm.config.loader import load_config

    config = load_config(arguments.config, arguments.overrides)
    program = load_program(arguments.of or ("finetune" if is_of_rows(config) else "train"))
    words = ["--config", arguments.config, *arguments.overrides]
    return program.run(program.parse([*words, "--show-rows", str(arguments.rows)]))


def is_of_rows(config: Any) -> bool:
    """Whether a config is for finetune.py, as far as its settings show it."""
    sections = (config.lora, config.dpo, config.reward_model, config.verifier)
    settings = (config.data.task, config.training.init_from)
    return any(value is not None for value in (*sections, *settings))
