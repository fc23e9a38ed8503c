"""The flags that train.py and finetune.py share."""

from pathlib import Path
from typing import Any

from tinylm.cli.program import Parser

SHOW_ROWS = "print the first N rows as training sees them: text, borders of documents, targets"


def training_parser(program: str, config: str, description: str) -> tuple[Parser, Any]:
    """The parser, and its group of flags that do something before a run;
    at most one of those is given.

    Settings may appear between the flags: parse with `parse_intermixed_args`.
    """
    parser = Parser(
        prog=f"python {program}",
        usage=f"python {program} --config {config} [section.key=value ...]",
        description=description,
        epilog="Every setting: docs/CONFIG_REFERENCE.md. Exit codes: 0 done, "
        "2 a mistake to correct, 3 diverged, 130/143 stopped after saving.",
    )
    parser.add_argument("--config", required=True, help="YAML file with the settings")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that override the file"
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        metavar="PATH",
        type=Path,
        help="continue from this checkpoint instead of the newest",
    )
    start.add_argument(
        "--no-resume",
        action="store_true",
        help="start a new run; the checkpoint folder must hold no checkpoints",
    )
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="resume although data, tokenizer or settings differ from the checkpoint's",
    )
    parser.add_argument(
        "--no-next", action="store_true", help="do not suggest what to run with the finished model"
    )
    group = parser.add_argument_group("before a run", "saves no checkpoint")
    before = group.add_mutually_exclusive_group()
    before.add_argument("--show-rows", type=int, metavar="N", help=SHOW_ROWS)
    return parser, before
