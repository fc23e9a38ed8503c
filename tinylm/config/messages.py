"""From an error of pydantic to one line for people: the location of the key,
what was found and what is expected.

The key is the error's location, or, for a rule between settings, the rule's;
messages are never parsed.
"""

import difflib
import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args, get_origin

from tinylm.common.errors import UserError
from tinylm.config.renamed import RENAMED
from tinylm.config.rules import RuleError
from tinylm.config.schema import Config, Section
from tinylm.config.yaml_file import Layer, shown

# What pydantic expects, in the words of someone who writes YAML; `{}` are the bounds of the field.
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text (in quotes, if YAML reads it as something else)",
    "string_unicode": "text without lone surrogates",
    "string_too_short": "text that is not empty",
    "string_too_long": "text of at most {max_length} characters",
    "string_pattern_mismatch": "text that matches {pattern}",
    "literal_error": "{expected}",
    "tuple_type": "a list, [a, b]",
    "dict_type": "names and values, {{a: b}}",
    "too_short": "a list that is not empty",
    "too_long": "a list of at most {max_length} items",
    "missing": "a longer list",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
}
# pydantic's words for the choices of a setting that is a number or a word; the first is explained.
_CHOICES = ("constrained-int",)
# What other programs call the length of a run.
_LENGTHS = ("epochs", "n_epochs", "num_epochs", "max_epochs", "num_train_epochs", "epoch")


def explain(error: Any, layers: Sequence[Layer]) -> UserError:
    """One error of pydantic as a UserError; `layers` are where the settings were written,
    the last one counts.
    """
    key = _key_of(error["loc"])
    kind = error["type"]
    if kind == "value_error":
        return explain_rule(key, error["ctx"]["error"], layers)
    where = (place_of([key], layers), key)
    if kind == "extra_forbidden" and key in RENAMED:
        return UserError(where, "this setting has a new name", f"Write {RENAMED[key]}")
    if kind == "extra_forbidden":
        return UserError(where, "no such setting", _suggestion(key))
    found = shown(error["input"])
    if kind == "model_type":
        fix = "Write its settings indented below it, or remove it"
        return UserError(where, f"must be a section, got {found}", fix)
    meaning = f"Meaning: {_meaning(key)}"
    if kind == "missing" and isinstance(error["loc"][-1], str):
        return UserError(where, f"required, but missing in {found}", meaning)
    expected = _EXPECTED[kind].format(**error.get("ctx", {}))
    if error["loc"][-1] in _CHOICES:
        expected += " or auto"
    return UserError(where, f"must be {expected}, got {found}", meaning)


def explain_rule(section: str, rule: RuleError, layers: Sequence[Layer]) -> UserError:
    """A broken rule, with the line of the first of its settings that is written;
    the others are defaults.
    """
    keys = [f"{section}.{name}".lstrip(".") for name in rule.keys]
    return UserError((place_of(keys, layers), keys[0]), rule.problem, rule.fix)


def place_of(keys: Iterable[str], layers: Sequence[Layer]) -> str:
    """Where the first of the keys that is written was written last;
    else where a section around it is.
    """
    keys = list(keys)
    while any(keys):
        for key in keys:
            for layer in reversed(layers):
                location = layer.find(key)
                if location is not None:
                    return location
        keys = [key.rpartition(".")[0] for key in keys]
    files = [layer.name for layer in layers if layer.has_lines]
    return files[-1] if files else "config"


def _key_of(location: Sequence[str | int]) -> str:
    """A location of pydantic as the user names it: a list of values is one setting,
    a section in a list has its number.

    >>> _key_of(("training", "betas", 1)), _key_of(("data", "mix", 1, "weight")), _key_of(("data", "mix", 1))
    ('training.betas', 'data.mix[1].weight', 'data.mix[1]')
    >>> _key_of(("data", "columns", "a", "[key]"))
    'data.columns.a'
    """
    key = ""
    for part in location:
        if part in _CHOICES:
            break
        if isinstance(part, str):
            if part != "[key]":  # pydantic's word for the key of a mapping, in place of its value
                key = f"{key}.{part}".lstrip(".")
        elif f"{_without_numbers(key)}[]" in _by_key():
            key = f"{key}[{part}]"
    return key


def _without_numbers(key: str) -> str:
    """The key as `sections` has it: data.mix[].weight for data.mix[1].weight."""
    return re.sub(r"\[\d+\]", "[]", key)


def _meaning(key: str) -> str | None:
    """The doc line of a setting, or of the one that it is a part of."""
    section, _, name = _without_numbers(key).rpartition(".")
    known = _by_key().get(section)
    return known.model_fields[name].description if known else _meaning(section)


def _suggestion(key: str) -> str:
    """Which setting an unknown key may mean: the same name in another section,
    or a similar one in this section.
    """
    section, _, name = key.rpartition(".")
    if name in _LENGTHS:
        return "training.max_steps, in optimizer steps, decides the length of a run"
    near = [
        f"{other}.{name}".lstrip(".") for other, kind in sections() if name in kind.model_fields
    ]
    names = list(_by_key()[_without_numbers(section)].model_fields)
    near = near or difflib.get_close_matches(name, names, n=1)
    return f"Did you mean {' or '.join(near)}?" if near else f"Settings here: {', '.join(names)}"


def sections(section: type[Section] = Config, key: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Every section with its dotted key, first the whole config, whose key is '';
    [] marks a list of sections.

    >>> [key for key, section in sections() if key.startswith(("m", "data"))]
    ['model', 'model.rope_scaling', 'model.moe', 'data', 'data.mix[]']
    """
    yield key, section
    for name, info in section.model_fields.items():
        for brackets, kind in _sections_in(info.annotation):
            yield from sections(kind, f"{key}.{name}{brackets}".lstrip("."))


def _sections_in(annotation: Any) -> Iterator[tuple[str, type[Section]]]:
    """The section in MoEConfig | None, and the one in tuple[MixPart, ...] with [] before it."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield "", annotation
    for part in get_args(annotation):
        for brackets, kind in _sections_in(part):
            yield ("[]" if get_origin(annotation) is tuple else "") + brackets, kind


@functools.cache
def _by_key() -> dict[str, type[Section]]:
    """`sections` as a dict."""
    return dict(sections())
