"""The flags of `infer.py` that set a field of SamplingConfig.

Their help texts are written here as well as in the schema, because importing the schema takes
longer than `--help` may; a test holds both to the same fields and defaults.
"""

import argparse
from typing import TYPE_CHECKING, Any

from tinylm.common.errors import UserError

if TYPE_CHECKING:
    from tinylm.config.schema import SamplingConfig

SAMPLING_HELP = {
    "max_new_tokens": "maximum number of tokens to generate (200)",
    "temperature": "divides the logits; 0 is greedy (0.8)",
    "top_k": "only the k most probable tokens (off)",
    "top_p": "only the most probable tokens that together reach p, Holtzman et al. 2020 (off)",
    "min_p": "only tokens at least min_p times as probable as the most probable one, "
    "Nguyen et al. 2024 (off)",
    "repetition_penalty": "makes tokens in the context less probable, Keskar et al. 2019; "
    "1 is off (1.0)",
    "no_repeat_ngram": "no sequence of N tokens occurs twice (off)",
    "stop": "string that ends the text and is not part of it; may be given several times (off)",
    "seed": "random seed (0)",
    "n_samples": "number of continuations of the prompt (1)",
    "n_beams": "more than 1: beam search for the most probable text instead of sampling (1)",
}


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Declare one flag per setting; a flag that is not given is absent from the namespace."""
    group = parser.add_argument_group(
        "sampling",
        "the checkpoint's config overrides the defaults shown; none turns a setting off",
    )
    for name, text in SAMPLING_HELP.items():
        if name == "stop":
            group.add_argument(
                flag(name), action="append", default=argparse.SUPPRESS, metavar="TEXT", help=text
            )
        else:
            group.add_argument(
                flag(name), type=parse_number, default=argparse.SUPPRESS, metavar="N", help=text
            )


def flag(name: str) -> str:
    """The flag of a setting.

    >>> flag("max_new_tokens")
    '--max-new-tokens'
    """
    return f"--{name.replace('_', '-')}"


def parse_number(text: str) -> int | float | str | None:
    """The number that `text` spells, or None for `none`; other text is left to validation.

    >>> parse_number("3"), parse_number("0.5"), parse_number("none"), parse_number("warm")
    (3, 0.5, None, 'warm')
    """
    if text == "none":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings that the flags set."""
    return {name: value for name, value in vars(arguments).items() if name in SAMPLING_HELP}


def sampling_settings(given: dict[str, Any], base: "SamplingConfig") -> "SamplingConfig":
    """`base` with the given settings in place of its own.

    Raises:
        UserError: naming the flag that is out of range.
    """
    from pydantic import ValidationError

    from tinylm.config.schema import SamplingConfig

    try:
        return SamplingConfig.model_validate({**base.model_dump(), **given})
    except ValidationError as invalid:
        error = invalid.errors()[0]
        if not error["loc"]:  # the one check of two fields together
            raise UserError(
                ("--n-beams", "--n-samples"),
                "beam search generates one text",
                "Set one of them to 1",
            ) from None
        bound = error["msg"].removeprefix("Input ").removeprefix("String ")
        raise UserError(
            flag(str(error["loc"][0])),
            f"{bound.replace('should', 'must', 1)}, got {error['input']!r}"[:160],
            "See python infer.py --help",
        ) from None
