"""The flags of `infer.py` that set a field of SamplingConfig.

The fields of the schema are the only list of them. They are read from its source text,
because importing the schema takes longer than `--help` may.
"""

import argparse
import ast
import importlib.util
from functools import cache
from typing import TYPE_CHECKING, Any

from tinylm.common.errors import UserError

if TYPE_CHECKING:
    from tinylm.config.schema import SamplingConfig


@cache
def sampling_help() -> dict[str, str]:
    """The help text of the flag of each field of SamplingConfig: its documentation and default.

    >>> sampling_help()["top_k"]
    'only the k most probable tokens; none: off (default: none)'
    """
    spec = importlib.util.find_spec("tinylm.config.schema")
    classes = spec.loader.get_source(spec.name).split("\nclass ")
    # Only this class is parsed: the whole file would take a sixth of the time of `--help`.
    source = next(text for text in classes if text.startswith("SamplingConfig("))
    section = ast.parse(f"class {source}").body[0]
    texts = {}
    for field, doc in zip(section.body, section.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
            text = ast.literal_eval(doc.value).replace("null", "none")
            default = ast.literal_eval(field.value)
            shown = "none" if default in (None, ()) else default
            texts[field.target.id] = f"{text} (default: {shown})"
    return texts


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Declare one flag per setting; a flag that is not given is absent from the namespace."""
    group = parser.add_argument_group(
        "sampling",
        "the checkpoint's config overrides the defaults shown; none turns a setting off",
    )
    for name, text in sampling_help().items():
        if name == "stop":
            text = f"{text}; may be given several times"
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
    return {name: value for name, value in vars(arguments).items() if name in sampling_help()}


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
