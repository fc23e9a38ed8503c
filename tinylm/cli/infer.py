"""What `infer.py` does first: check the flags and read the prompt, before torch is imported.

generate.py does the rest.
"""

import argparse
import sys
from typing import Any

from tinylm.cli.sampling_flags import flag, given_settings, sampling_settings
from tinylm.common.errors import UserError
from tinylm.config.schema import SamplingConfig


def infer(arguments: argparse.Namespace) -> int:
    """Check the flags, read the prompt, and generate; the exit code."""
    given = given_settings(arguments)
    sampling_settings(given, SamplingConfig())
    check_chat(arguments, given)
    check_best_of(arguments, given)
    prompt = None if arguments.chat else read_prompt(arguments.prompt)

    from tinylm.cli.generate import generate  # torch takes a second, so after the checks

    return generate(prompt, given, arguments)


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
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            "standard input", f"not UTF-8 text (byte {error.start})", "Convert it to UTF-8"
        ) from None
