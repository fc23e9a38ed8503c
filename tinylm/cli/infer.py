"""What `infer.py` does first: check the flags and read the prompt, before torch is imported.

generate.py does the rest.
"""

import argparse
import sys
from typing import Any

from tinylm.cli.prompt_files import read_prompts, read_stdin
from tinylm.cli.sampling_flags import flag, given_settings, sampling_settings
from tinylm.common.errors import UserError
from tinylm.common.files import read_regular
from tinylm.config.schema import SamplingConfig
from tinylm.generate.constraint import Constraint


def infer(arguments: argparse.Namespace) -> int:
    """Check the flags, read the prompt, and generate; the exit code."""
    given = given_settings(arguments)
    sampling_settings(given, SamplingConfig())
    check_input(arguments)
    check_chat(arguments, given)
    check_best_of(arguments, given)
    constraint = read_constraint(arguments)
    if arguments.input is not None:
        rows = read_prompts(arguments.input)

        from tinylm.cli.answer_file import answer_file

        return answer_file(rows, given, arguments, constraint)
    prompt = None if arguments.chat else read_prompt(arguments.prompt)

    from tinylm.cli.generate import generate  # torch takes a second, so after the checks

    return generate(prompt, given, arguments, constraint)


def check_input(arguments: argparse.Namespace) -> None:
    """Raise a UserError for a flag that cannot be combined with --input, or needs it."""
    if (arguments.input is None) != (arguments.output is None):
        raise UserError(
            "--input, --output",
            "each needs the other",
            "Give --input prompts.jsonl --output answers.jsonl, or neither",
        )
    if arguments.input is None:
        if arguments.batch_size is not None:
            raise UserError("--batch-size", "only valid with --input", "Remove it")
        if arguments.ckpt is not None and len(arguments.ckpt) > 1:
            raise UserError("--ckpt", "several are only valid with --input", "Give one")
        return
    is_given = {
        "--prompt": arguments.prompt is not None,
        "--chat": arguments.chat,
        "--json": arguments.json,
        "--show-probs": arguments.show_probs,
        "--lookup": arguments.lookup,
        "--best-of": arguments.best_of is not None,
    }
    for name in is_given:
        if is_given[name]:
            raise UserError(name, "cannot be combined with --input", "Remove one of the two")
    if arguments.output.suffix != ".jsonl":
        where = ("--output", arguments.output)
        raise UserError(where, "must end in .jsonl", "Rename it: answers.jsonl")


def check_chat(arguments: argparse.Namespace, given: dict[str, Any]) -> None:
    """Raise a UserError for a flag that cannot be combined with --chat."""
    if not arguments.chat:
        return
    is_given = {
        "--prompt": arguments.prompt is not None,
        "--json": arguments.json,
        "--show-probs": arguments.show_probs,
        "--no-wrap": arguments.no_wrap,
        "--n-samples": given.get("n_samples", 1) != 1,
    }
    for name in is_given:
        if is_given[name]:
            raise UserError(name, "cannot be combined with --chat", "Remove one of the two")
    if sys.stdin is None:
        raise UserError(
            "--chat",
            "standard input is closed",
            "Start it in a terminal, or pipe questions into it, one per line",
        )


def check_best_of(arguments: argparse.Namespace, given: dict[str, Any]) -> None:
    """Raise a UserError for flags that cannot be combined with --best-of."""
    n = arguments.best_of
    if (n is None) != (arguments.verifier is None):
        raise UserError(
            "--best-of, --verifier",
            "each needs the other",
            "Give --best-of 8 --verifier FILE, or neither",
        )
    if n is None:
        return
    if arguments.lookup:
        raise UserError("--lookup", "cannot be combined with --best-of", "Remove one of the two")
    if arguments.chat:
        raise UserError("--best-of", "cannot be combined with --chat", "Remove one of the two")
    if not isinstance(n, int) or not 2 <= n <= 1024:
        raise UserError("--best-of", f"must be a whole number from 2 to 1024, got {n}")
    for name in ("n_samples", "n_beams"):
        if given.get(name, 1) != 1:
            raise UserError(
                flag(name),
                "cannot be combined with --best-of, which sets the number of answers",
                "Remove one of the two",
            )
    if arguments.show_probs:
        raise UserError(
            "--show-probs",
            "cannot be combined with --best-of, which prints finished answers",
            "Remove one of the two",
        )


def read_constraint(arguments: argparse.Namespace) -> Constraint | None:
    """The constraint of --json-schema or --regex, checked as far as it can be without a tokenizer."""
    schema, pattern = arguments.json_schema, arguments.regex
    if schema is None and pattern is None:
        return None
    if schema is not None and pattern is not None:
        raise UserError("--json-schema", "cannot be combined with --regex", "Remove one of the two")
    if pattern is not None:
        constraint = Constraint.regex(pattern, "--regex")
    elif schema.lstrip().startswith("{"):
        constraint = Constraint.json_schema(schema, "--json-schema")
    else:
        constraint = Constraint.json_schema(read_schema(schema), ("--json-schema", schema))
    constraint.grammar()
    return constraint


def read_schema(path: str) -> str:
    """The text of a file of --json-schema."""
    try:
        return read_regular(path).decode("utf-8-sig")
    except UserError as error:
        raise error.within("--json-schema") from None
    except UnicodeDecodeError as error:
        where = ("--json-schema", path)
        raise UserError(
            where, f"not UTF-8 text (byte {error.start})", "Convert it to UTF-8"
        ) from None


def read_prompt(argument: str | None) -> str:
    """The text of --prompt, or standard input without its last newline."""
    if argument is not None and argument != "-":
        try:
            argument.encode()
        except UnicodeEncodeError:
            # Python keeps undecodable bytes of the command line as lone surrogates.
            raise UserError(
                "--prompt",
                "not UTF-8 text",
                "Type it in a UTF-8 terminal, or pipe a UTF-8 file into the program",
            ) from None
        return argument
    if sys.stdin is None or (argument is None and sys.stdin.isatty()):
        raise UserError(
            "--prompt",
            "missing",
            'Give --prompt "Attention is", or pipe a text into the program; '
            '--prompt "" starts from nothing',
        )
    return read_stdin()
