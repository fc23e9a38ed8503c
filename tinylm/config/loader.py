import difflib
import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from tinylm.common.errors import UserError, printable
from tinylm.config.schema import Config, ModelConfig, Section, TokenizerConfig

CONFIG_BYTES_LIMIT = (
    100_000  # PyYAML reads this much in half a second, and no honest config comes near
)
CONFIG_DEPTH_LIMIT = 12


@dataclass(frozen=True)
class Place:
    """Where a setting was written: `config.yaml:12`, or the command line."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return printable(self.file) if self.line is None else f"{printable(self.file)}:{self.line}"


@dataclass
class Settings:
    """Nested plain values, and where each dotted key was written."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)

    def put(self, key: str, value: Any, place: Place) -> None:
        """Set a dotted key, making the sections on the way."""
        section, _, name = key.rpartition(".")
        self.open(section, place)[name] = value
        self.places[key] = place

    def open(self, key: str, place: Place) -> dict[str, Any]:
        """The section with that dotted key, made where there is none."""
        section, names = self.values, key.split(".") if key else []
        for depth, name in enumerate(names):
            if not isinstance(section.get(name), dict):
                section[name] = {}
                self.places[".".join(names[: depth + 1])] = place
            section = section[name]
        return section

    def place_of(self, key: str) -> Place:
        """Where `key`, or the nearest section around it, was written."""
        while key not in self.places and "." in key:
            key = key.rpartition(".")[0]
        return self.places.get(key) or self.places.get("") or Place("config")


class _Loader(yaml.SafeLoader):
    """YAML as people expect it in a config: 3e-4 is a number, 12:30 and dates are text; tags, aliases and endless nesting are errors."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="an alias (*name) is not allowed here",
                problem_mark=self.peek_event().start_mark,
            )
        if self.depth > CONFIG_DEPTH_LIMIT:
            raise yaml.MarkedYAMLError(
                problem=f"nested deeper than {CONFIG_DEPTH_LIMIT} levels",
                problem_mark=self.peek_event().start_mark,
            )
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node.tag not in (
            *_SCALARS,
            f"{_TAG}seq",
            f"{_TAG}map",
        ):  # a tag could stand for any Python object
            raise yaml.MarkedYAMLError(
                problem=f"the tag {node.tag.replace(_TAG, '!!')} is not allowed here",
                problem_mark=node.start_mark,
            )
        return node


def _whole_or_float(text: str) -> int | float:
    """1e5 is a count, 3e-4 and 5.0 are not."""
    value = float(text)
    return int(value) if "." not in text and value.is_integer() else value


# How a scalar of each tag is read, and so what a setting can be. YAML 1.1 also has numbers to the bases 2, 8, 16 and 60
# (010 is 8, 12:30 is 750) and dates, and wants a dot and a signed exponent in a float.
_TAG = "tag:yaml.org,2002:"
_SCALARS: dict[str, Callable[[str], Any]] = {
    f"{_TAG}null": lambda text: None,
    f"{_TAG}bool": lambda text: _Loader.bool_values[text.lower()],
    f"{_TAG}int": int,
    f"{_TAG}float": _whole_or_float,
    f"{_TAG}str": str,
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in (f"{_TAG}null", f"{_TAG}bool")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_TAG}int", re.compile(r"[-+]?\d[\d_]*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d+)?$"),
    list("-+.0123456789"),
)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The settings in the YAML file `path`, after the files it extends and with `section.key=value` overrides on top.

    Raises:
        UserError: naming the file, the line, the key, what was found and what would do.
    """
    settings = Settings(places={"": Place(str(path))})
    _merge_file(settings, Path(path), ())
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            raise UserError(
                f"{printable(override)}: an override is written section.key=value, such as training.max_steps=100."
            )
        if (
            key == "tokenizer.path"
        ):  # takes the place of a tokenizer that is learned, with all that says how
            for name in ("kind", "vocab_size", "pattern", "learn_docs", "unknown"):
                settings.open("tokenizer", Place("command line")).pop(name, None)
        _put_node(settings, key, _parse(text, Place(f"command line: {key}")), Place("command line"))
    return _validate(settings)


def with_model(config: Config, model: ModelConfig, tokenizer: TokenizerConfig) -> Config:
    """The settings of `config`, with another's `model` and `tokenizer` wherever it says nothing.

    A setting of the model counts by itself, the tokenizer as a whole.

    Raises:
        UserError: the result contradicts itself.
    """
    written = {
        name: value
        for name, value in config.model
        if name in config.model.model_fields_set and value is not None
    }
    own_tokenizer = config.tokenizer.model_fields_set
    made = config.model_copy(
        update={
            "model": model.model_copy(update=written),
            "tokenizer": config.tokenizer if own_tokenizer else tokenizer,
        }
    )
    return _validate(Settings(made.to_plain()))


def read_yaml(path: Path) -> yaml.Node | None:
    """The YAML document in `path` as nodes with line marks, checked for size and encoding."""
    try:
        if not path.is_file():
            kind = (
                "a directory"
                if path.is_dir()
                else "not a regular file"
                if path.exists()
                else "not found"
            )
            raise UserError(f"{printable(path)}: {kind}. Give the path of a YAML file.")
        size = path.stat().st_size
        if size > CONFIG_BYTES_LIMIT:
            raise UserError(
                f"{printable(path)}: {size} bytes, and a config has at most {CONFIG_BYTES_LIMIT}. Is it the right file?"
            )
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{printable(path)}: not UTF-8 text (byte {error.start}). Save it as UTF-8."
        ) from None
    except OSError as error:
        raise UserError(
            f"{printable(path)}: {error.strerror}. Give the path of a readable YAML file."
        ) from None
    return _parse(text, Place(str(path), 1))


def read_list(path: Path) -> list[tuple[Place, dict[str, Any]]]:
    """The items of a YAML file that is a list of mappings, each with its place.

    Raises:
        UserError: it is not, or it is empty.
    """
    node = read_yaml(path)
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        raise UserError(
            f"{printable(path)}: expected a list of items, and it has none. Begin each item with a dash: - name: ..."
        )
    places = [Place(str(path), item.start_mark.line + 1) for item in node.value]
    for place, item in zip(places, node.value, strict=True):
        if not isinstance(item, yaml.MappingNode):
            found = _shown(_plain(Settings(), item, "item", place))
            raise UserError(
                f"{place}: expected an item with keys, found {found}. Write name: value on lines of their own."
            )
    return [
        (place, _plain(Settings(), item, "item", place))
        for place, item in zip(places, node.value, strict=True)
    ]


def _parse(text: str, place: Place) -> yaml.Node | None:
    """The one document in `text`, or None if it is empty; the place has a line if `text` is a file."""
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, problem = mark.line + 1 if mark else 1, str(error.problem)
        if "\\t" in problem:
            problem = "a tab indents this line, and YAML wants spaces"
    except yaml.reader.ReaderError as error:
        line, problem = (
            text.count("\n", 0, error.position) + 1,
            f"the character {chr(error.character)!r} is not allowed",
        )
    finally:
        if loader:
            loader.dispose()
    if place.line is None:
        raise UserError(f"{place}: not YAML: {printable(problem)}. Put quotes around the value.")
    raise UserError(
        f"{Place(place.file, line)}: not YAML: {printable(problem)}. Look at this line and the one above."
    )


def _merge_file(settings: Settings, path: Path, seen: tuple[Path, ...]) -> None:
    """Put the settings of `path` on top of those of the file that it extends; `seen` are the files that lead to it."""
    node = read_yaml(path)
    if node is None:
        raise UserError(
            f"{printable(path)}: the file is empty. Write the settings that differ from the defaults, for example model: {{n_layers: 4}}."
        )
    if not isinstance(node, yaml.MappingNode):
        place = Place(str(path), node.start_mark.line + 1)
        raise UserError(
            f"{place}: expected a config with sections ({', '.join(Config.model_fields)}). Write name: and its settings indented below."
        )
    pairs = [
        (key.value, value, Place(str(path), key.start_mark.line + 1))
        for key, value in _pairs(node, str(path), "")
    ]
    seen = (*seen, path.resolve())
    for key, value, place in pairs:
        if key == "extends":
            _merge_file(settings, _extended(value, path, place, seen), seen)
    for key, value, place in pairs:
        if key != "extends":
            _put_node(settings, key, value, place)


def _extended(node: yaml.Node, path: Path, place: Place, seen: tuple[Path, ...]) -> Path:
    """The file that `extends:` at `place` names."""
    if not isinstance(node, yaml.ScalarNode) or not node.value:
        raise UserError(
            f"{place}: extends: expected the path of one YAML file. Write it relative to this file."
        )
    parent = path.parent / node.value
    if not os.path.isfile(
        parent
    ):  # unlike Path.is_file, also false for a name that no file can have
        raise UserError(
            f"{place}: extends: {printable(parent)} is not a file. Write the path relative to this file."
        )
    if parent.resolve() in seen:
        raise UserError(
            f"{place}: extends: {printable(parent)} extends this file in turn, a circle. Take one extends: out."
        )
    return parent


def _pairs(
    node: yaml.MappingNode, file: str, section: str
) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    """The keys and values of a mapping; a key that stands twice is an error that names both lines."""
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        # A dotted key would be a second way to write a setting, and could stand beside the first.
        if (
            not isinstance(key, yaml.ScalarNode)
            or not key.value
            or not key.value.isprintable()
            or "." in key.value
        ):
            found = _shown(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            raise UserError(
                f"{Place(file, line)}: expected one plain name as key, found {found}. Write section: and, indented below it, name: value."
            )
        if key.value in lines:
            raise UserError(
                f"{Place(file, line)}: {section}{key.value}: the key stands on line {lines[key.value]} already. Keep one."
            )
        lines[key.value] = line
        yield key, value


def _put_node(settings: Settings, key: str, node: yaml.Node | None, place: Place) -> None:
    """Write a YAML node into the settings; mappings are merged key by key, everything else replaces."""
    if isinstance(node, yaml.MappingNode):
        settings.open(key, place)
        settings.places[key] = place
        for child, value in _pairs(node, place.file, f"{key}."):
            line = child.start_mark.line + 1 if place.line else None
            _put_node(settings, f"{key}.{child.value}", value, Place(place.file, line))
    else:
        if f"{key}[0]" in settings.places:  # a list that this value replaces
            settings.places = {
                known: at
                for known, at in settings.places.items()
                if not known.startswith(f"{key}[")
            }
        settings.put(key, None if node is None else _plain(settings, node, key, place), place)


def _plain(settings: Settings, node: yaml.Node, key: str, place: Place) -> Any:
    """A scalar, a list of scalars or a list of sections as Python has it; the place of each key in a list is noted."""
    settings.places[key] = place
    if isinstance(node, yaml.SequenceNode):
        lines = [item.start_mark.line + 1 if place.line else None for item in node.value]
        return [
            _plain(settings, item, f"{key}[{i}]", Place(place.file, line))
            for i, (item, line) in enumerate(zip(node.value, lines, strict=True))
        ]
    if isinstance(node, yaml.MappingNode):
        if key.endswith("]") and _without_numbers(key) not in _by_key():
            raise UserError(
                f"{place}: {key}: expected a plain value, found key: value. Put quotes around text with a colon."
            )
        pairs = [
            (child, value, child.start_mark.line + 1 if place.line else None)
            for child, value in _pairs(node, place.file, f"{key}.")
        ]
        return {
            child.value: _plain(settings, value, f"{key}.{child.value}", Place(place.file, line))
            for child, value, line in pairs
        }
    try:
        return _SCALARS[node.tag](node.value)
    except (ValueError, KeyError):
        raise UserError(
            f"{place}: {key}: {_shown(node.value)} is no {node.tag.removeprefix(_TAG)}. Write it out, or quote it if it is text."
        ) from None


def _validate(settings: Settings) -> Config:
    """The settings as `Config`, or the first mistake in them as a `UserError` with its place."""
    try:
        return Config.model_validate(settings.values)
    except ValidationError as invalid:
        raise UserError(_explain(invalid.errors()[0], settings)) from None


# What pydantic expects, in the words of someone who writes YAML; `{}` are the bounds of the field.
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text (in quotes, if YAML reads it as something else)",
    "string_unicode": "text without lone surrogates",
    "string_too_short": "text that is not empty",
    "string_too_long": "text of at most {max_length} characters",
    "string_pattern_mismatch": "text that matches {pattern}",
    "tuple_type": "a list, [a, b]",
    "dict_type": "names and values, {{a: b}}",
    "too_short": "a list that is not empty",
    "too_long": "at most {max_length} items",
    "missing": "more items",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
}


def _explain(error: Any, settings: Settings) -> str:
    """One pydantic error as: place, key, what was found, what would do."""
    key = _key_of(error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{settings.place_of(key)}: {key}: no such setting; {_nearest(key)}"
    if error["type"] == "value_error":
        return _explain_disagreement(key, str(error["ctx"]["error"]), settings)
    where, found = f"{settings.place_of(key)}: {key}", _shown(error["input"])
    if error["type"] == "model_type":
        return f"{where}: expected a section, found {found}. Write its settings indented below it, or take it out."
    if error["type"] == "missing" and isinstance(error["loc"][-1], str):
        return f"{where}: missing in {found}. Meaning: {_meaning(key)}."
    expected = _EXPECTED.get(error["type"], error["msg"].removeprefix("Input should be "))
    return f"{where}: expected {expected.format(**error.get('ctx', {}))}, found {found}. Meaning: {_meaning(key)}."


def _key_of(location: Sequence[str | int]) -> str:
    """Where pydantic found an error, as the user names it: a list of plain values is one setting, a section in a list has its number.

    >>> _key_of(("training", "betas", 1)), _key_of(("data", "mix", 1, "weight")), _key_of(("data", "mix", 1))
    ('training.betas', 'data.mix[1].weight', 'data.mix[1]')
    """
    key = ""
    for part in location:
        if isinstance(part, str):
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


def _explain_disagreement(section: str, message: str, settings: Settings) -> str:
    """What a validator above raised, with the place of the first key in it that somebody wrote; the others are defaults."""
    prefix = f"{section}." if section else ""
    named = [f"{prefix}{word}" for word in re.findall(r"\w+(?:\.\w+)*", message)]
    written = next((key for key in named if key in settings.places), named[0])
    return f"{settings.place_of(written)}: {prefix}{message}."


def _nearest(key: str) -> str:
    """Which settings an unknown key may stand for: that name in another section, or a similar one in this."""
    section, _, name = key.rpartition(".")
    near = [
        f"{other}.{name}".lstrip(".") for other, kind in sections() if name in kind.model_fields
    ] or difflib.get_close_matches(name, _fields(section), n=1)
    return (
        f"did you mean {' or '.join(near)}?"
        if near
        else f"the settings here are {', '.join(_fields(section))}."
    )


def _shown(value: Any) -> str:
    """A value as YAML has it, cut to what a line can hold."""
    text = printable(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 80 else f"{text[:77]}..."


def sections(section: type[Section] = Config, key: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Every section with its dotted key, from the whole config, whose key is '', downwards; [] marks a list of sections.

    >>> [key for key, section in sections() if key.startswith(("m", "data"))]
    ['model', 'model.moe', 'data', 'data.mix[]']
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


def _fields(key: str) -> dict[str, FieldInfo]:
    """The fields of the section with that dotted key."""
    return _by_key()[_without_numbers(key)].model_fields


@functools.cache
def _by_key() -> dict[str, type[Section]]:
    """`sections`, to be looked up in."""
    return dict(sections())
