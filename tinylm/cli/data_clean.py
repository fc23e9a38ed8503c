"""`python -m tinylm data clean`: a corpus without duplicates, poor text and evaluation rows."""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylm.cli.text_flags import (
    TEXT_FLAGS,
    add_processes_flag,
    add_text_flags,
    require_positive,
    text_source,
)
from tinylm.common.console import progress_bar
from tinylm.common.errors import UserError, printable, rename_settings
from tinylm.common.tables import Table, print_table

if TYPE_CHECKING:
    from tinylm.text.clean import Report

SUMMARY = "remove duplicates, poor text and evaluation rows from a corpus"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.usage = "python -m tinylm data clean --data PATH ... --out FILE.jsonl [flags]"
    parser.description = (
        "Remove equal and near documents, text that fails quality rules, and documents that contain "
        "evaluation rows; write the rest as JSON lines, and beside them a report with examples."
    )
    add_text_flags(
        parser, separator="text between documents in a .txt file (default: each line is a document)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="a new file")
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="NAME",
        help="evaluation rows that the corpus must not contain: a task (gsm8k, from the hub), a task "
        "with its file (gsm8k=test.jsonl), or a file of text or rows",
    )
    parser.add_argument(
        "--rules",
        choices=("none", "basic", "gopher"),
        default="basic",
        help="quality rules: basic for any language, gopher for English web pages (default: basic)",
    )
    parser.add_argument(
        "--near",
        type=float,
        default=0.8,
        metavar="J",
        help="similarity of near duplicates, 0.5 to 1; 1: only equal texts (default: 0.8)",
    )
    add_processes_flag(parser, "number of processes; the result is the same")


@rename_settings(TEXT_FLAGS)
def run(arguments: argparse.Namespace) -> int:
    """Write the documents that are kept and the report, print what was removed and both paths."""
    from tinylm.common.files import require_new, write_atomic
    from tinylm.text.clean import CleanSpec, clean
    from tinylm.text.contamination import ngram_index

    require_positive(arguments, "processes")
    if arguments.docs is not None:
        raise UserError("--docs", "cannot be combined with clean", "Remove it")
    out = arguments.out
    if out.suffix != ".jsonl":
        problem = "the documents are written as JSON lines, to a file that ends with .jsonl"
        raise UserError(("--out", out), problem, "Choose such a name")
    if not 0.5 <= arguments.near <= 1:
        raise UserError("--near", f"must be from 0.5 to 1, got {arguments.near}", "Give 0.8")
    report_path = out.with_suffix(".report.json")
    require_new(out)
    require_new(report_path)
    source = text_source(arguments)
    index = None
    if arguments.against:
        rows = (row for name in arguments.against for row in evaluation_rows(name))
        index = ngram_index(rows)
    spec = CleanSpec(arguments.rules, arguments.near if arguments.near < 1 else None, index)
    with progress_bar() as on_progress:
        report = clean(source, out, spec, processes=arguments.processes, on_progress=on_progress)
    settings = {
        "data": arguments.data,
        "against": arguments.against,
        "rules": arguments.rules,
        "near": arguments.near,
    }
    content = json.dumps({"settings": settings, **vars(report)}, ensure_ascii=False, indent=1)
    write_atomic(report_path, content + "\n", "--out")
    show(report)
    print(printable(report_path))
    print(printable(out))
    return 0


def show(report: "Report") -> None:
    """Print how much was kept, and how much was removed for each reason, with an example."""
    table = Table(("", "documents", "characters", "the first"), text=("", "the first"))
    table.add_row("read", f"{report.documents:,}", f"{report.characters:,}", "")
    for reason, count in report.removed.most_common():
        example = report.examples[reason][0]
        first = f"document {example['document']}: {example['detail']}"
        characters = f"{report.removed_characters[reason]:,}"
        table.add_row(f"removed: {reason}", f"{count:,}", characters, first)
    table.add_row("kept", f"{report.kept:,}", f"{report.kept_characters:,}", "")
    print_table(table)
    if report.not_compared:
        print(f"{report.not_compared:,} evaluation texts of under 8 words were not compared")


def evaluation_rows(name: str) -> Iterator[tuple[str, str]]:
    """The texts of evaluation rows, each with where it is from.

    Args:
        name: a task, a task with its file after =, or a file of rows or text.

    Raises:
        UserError: there is neither a task nor a file of this name, or it cannot be read.
    """
    from tinylm.eval.tasks.data import evaluation_texts, load_task
    from tinylm.eval.tasks.table import EVALUATED_TASKS

    task, equals, path = name.partition("=")
    if task in EVALUATED_TASKS and (equals or not os.path.lexists(name)):
        examples = load_task(EVALUATED_TASKS[task], Path(path) if equals else None).examples
        yield from evaluation_texts(examples)
        return
    if not os.path.lexists(name):
        fix = f"Give a file, or one of: {', '.join(EVALUATED_TASKS)}"
        raise UserError(("--against", name), "no such file and no such task", fix)
    yield from file_texts(Path(name))


def file_texts(path: Path) -> Iterator[tuple[str, str]]:
    """Every text of a file: its documents, or each string in its rows."""
    from tinylm.text.documents import ROW_READERS, file_documents, file_kind, file_rows

    if file_kind(path) not in ROW_READERS:
        for number, text in enumerate(file_documents(path, "text", None), start=1):
            yield f"{path}: document {number}", text
        return
    for location, row in file_rows(path):
        for text in strings_in(row):
            yield str(location), text


def strings_in(value: Any) -> Iterator[str]:
    """Every string in a value of JSON, keys excepted.

    >>> list(strings_in({"a": "x", "b": [{"c": "y"}, 3]}))
    ['x', 'y']
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from strings_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from strings_in(part)
