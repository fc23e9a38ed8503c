"""YAML as people expect it in a config, with the line of every key: the only code that parses YAML.

3e-4 and 1e5 are numbers, 12:30 and dates are text; tags, aliases and deep nesting are errors.
`read_layer` reads a config file, `override_layer` a `section.key=value` of the command line,
`read_list` a file that is a list of items. Knows nothing of what the settings mean.
"""

import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tinylm.common.errors import UserError, printable
from tinylm.common.files import open_regular, reading

# PyYAML reads this much in half a second, and no real config comes near it.
FILE_BYTES_LIMIT = 100_000
DEPTH_LIMIT = 12

_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Refuses what could be anything but plain values: tags, aliases, endless nesting."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        problem = None
        if self.check_event(yaml.AliasEvent):
            problem = "aliases (*name) are not supported"
        elif self.depth > DEPTH_LIMIT:
            problem = f"nested deeper than {DEPTH_LIMIT} levels"
        if problem is not None:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node.tag not in (*_SCALARS, f"{_TAG}seq", f"{_TAG}map"):  # could be any Python object
            problem = f"the tag {node.tag.replace(_TAG, '!!')} is not supported"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return node


def _number(text: str) -> int | float:
    """1e5 is a whole number; 3e-4 and 5.0 are not."""
    value = float(text)
    return int(value) if "." not in text and value.is_integer() else value


# How a scalar of each tag is read. YAML 1.1 also has numbers to the bases 2, 8, 16 and 60 (010 is
# 8, 12:30 is 750) and dates, and requires a dot and a signed exponent in a float.
_SCALARS: dict[str, Callable[[str], Any]] = {
    f"{_TAG}null": lambda text: None,
    f"{_TAG}bool": lambda text: _Loader.bool_values[text.lower()],
    f"{_TAG}int": int,
    f"{_TAG}float": _number,
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


@dataclass(frozen=True)
class Layer:
    """One source of settings: a config file, or an override of the command line."""

    name: str
    node: yaml.Node | None
    """None: an empty file"""
    has_lines: bool = True

    def location(self, node: yaml.Node) -> str:
        """Where a node is, `config.yaml:12`."""
        return f"{self.name}:{node.start_mark.line + 1}" if self.has_lines else self.name

    def find(self, key: str) -> str | None:
        """Where a key such as data.mix[1].weight is written here;
        None if an earlier layer can have it.

        A list or a plain value replaces what earlier layers have;
        the location is then that of its nearest part.
        """
        node, location, replaced = self.node, self.name, False
        for part in re.findall(r"[^.\[\]]+", key):
            if isinstance(node, yaml.MappingNode):
                written = [(name, value) for name, value in node.value if name.value == part]
                if not written:
                    return location if replaced else None
                name, node = written[0]
                location = self.location(name)
                continue
            replaced = True
            if not isinstance(node, yaml.SequenceNode) or int(part) >= len(node.value):
                break
            node = node.value[int(part)]
            location = self.location(node)
        return location

    def values(self, node: yaml.Node, key: str = "") -> Any:
        """A node as plain Python values; `key` is its dotted key, for errors."""
        if isinstance(node, yaml.SequenceNode):
            return [self.values(item, f"{key}[{i}]") for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            if node.style is None and not node.value:
                self._refuse_comment(node, key)
            try:
                return _SCALARS[node.tag](node.value)
            except (ValueError, KeyError):
                problem = f"not a valid {node.tag.removeprefix(_TAG)}: {shown(node.value)}"
                fix = "Write it out, or quote it if it is text"
                raise UserError((self.location(node), key), problem, fix) from None
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for name, value in node.value:
            # A dotted key would be a second way to write a setting.
            plain = isinstance(name, yaml.ScalarNode) and name.value.isprintable()
            if not plain or not name.value or "." in name.value:
                got = "a list or mapping"
                if isinstance(name, yaml.ScalarNode):
                    got = shown(name.value)
                fix = "Write section: and, indented below it, name: value"
                raise UserError(
                    self.location(name), f"a key must be one plain name, got {got}", fix
                )
            dotted = f"{key}.{name.value}".lstrip(".")
            if name.value in lines:
                problem = f"already set on line {lines[name.value]}"
                raise UserError((self.location(name), dotted), problem, "Keep one")
            lines[name.value] = name.start_mark.line + 1
            found[name.value] = self.values(value, dotted)
        return found

    def _refuse_comment(self, node: yaml.Node, key: str) -> None:
        """Raise a UserError if a comment is all that follows the key:
        in `separator: ##` it may be meant as text.
        """
        mark = node.start_mark
        if mark.buffer is None:  # the command line
            return
        rest = mark.buffer[mark.pointer :].partition("\n")[0].strip(" \r\0")
        if rest.startswith("#"):
            problem = f"{shown(rest)} is a comment in YAML, so nothing is set"
            fix = "Put quotes around it if it is text, or write null before it"
            raise UserError((self.location(node), key), problem, fix)


def read_layer(path: Path) -> Layer:
    """The YAML document in `path`, checked for size and encoding.

    Raises:
        UserError: it is not a file, too large, or not YAML.
    """
    fix = "Give the path of a YAML file"
    if os.path.isdir(path):
        raise UserError(path, "a directory", fix)
    try:
        file = open_regular(path)
    except UserError as error:
        raise error.within(fix=fix) from None
    with reading(path), file:
        size = os.fstat(file.fileno()).st_size
        if size > FILE_BYTES_LIMIT:
            problem = f"{size} bytes, but a config has at most {FILE_BYTES_LIMIT}"
            raise UserError(path, problem, "Is it the right file?")
        raw = file.read()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 text (byte {error.start})"
        raise UserError(path, problem, "Save it as UTF-8") from None
    return Layer(str(path), _parse(text, str(path)))


def override_layer(key: str, text: str, *, is_text: bool, has_texts: bool = False) -> Layer:
    r"""The setting `key` (dotted) of the command line, whose value is `text`.

    The value of a text setting is the text as typed: only `null` is null, and quotes around all of
    it are YAML's, so that "\n" and "null" can be written. Other values are written as in YAML;
    with `has_texts` the items of a list are texts as typed.

    >>> layer = override_layer("data.document_separator", "---", is_text=True)
    >>> layer.values(layer.node)
    {'data': {'document_separator': '---'}}
    """
    mark = yaml.Mark("command line", 0, 0, 0, None, None)
    as_typed = yaml.ScalarNode(f"{_TAG}str", text, mark)
    value: yaml.Node | None
    if not is_text:
        # YAML may read nothing in it: a comment, or a border of documents.
        value = _parse(text, None, key) or as_typed
        if has_texts and isinstance(value, yaml.SequenceNode | yaml.ScalarNode):
            items = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for item in items:
                if isinstance(item, yaml.ScalarNode) and item.value != "null":
                    item.tag = f"{_TAG}str"
    elif text == "null":
        value = yaml.ScalarNode(f"{_TAG}null", text, mark)
    else:
        value = as_typed
        if text[:1] in ("'", '"') and text[-1:] == text[:1]:
            with suppress(yaml.YAMLError):
                node = _Loader(text).get_single_node()
                if isinstance(node, yaml.ScalarNode) and node.style == text[0]:
                    value = node
    for name in reversed(key.split(".")):
        name_node = yaml.ScalarNode(f"{_TAG}str", name, mark)
        value = yaml.MappingNode(f"{_TAG}map", [(name_node, value)], mark)
    return Layer("command line", value, has_lines=False)


def read_list(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The items of a YAML file that is a list of mappings, each with its location (`FILE:LINE`).

    Raises:
        UserError: it is not such a list, or it is empty.
    """
    layer = read_layer(path)
    if not isinstance(layer.node, yaml.SequenceNode) or not layer.node.value:
        fix = "Begin each item with a dash: - name: ..."
        raise UserError(path, "must be a list with at least one item", fix)
    items = []
    for node in layer.node.value:
        if not isinstance(node, yaml.MappingNode):
            problem = f"an item must have keys, got {shown(layer.values(node, 'item'))}"
            raise UserError(layer.location(node), problem, "Write each name: value on its own line")
        items.append((layer.location(node), layer.values(node, "item")))
    return items


def shown(value: Any) -> str:
    """A value as it is in YAML, shortened to fit on a line."""
    text = printable(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 80 else f"{text[:77]}..."


def _parse(text: str, file: str | None, key: str = "") -> yaml.Node | None:
    """The one document in `text`, from a file or, without one, the value of an override;
    None if nothing is written in it, not even null or quotes.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if isinstance(node, yaml.ScalarNode) and node.style is None and not node.value:
            return None
        return node
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = str(error.problem)
        if "\\t" in problem:
            problem = "a tab indents this line, but YAML needs spaces"
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"the character {chr(error.character)!r} is not allowed"
    finally:
        if loader:
            loader.dispose()
    if file is None:
        where = ("command line", key)
        raise UserError(where, f"not valid YAML: {problem}", "Put quotes around the value")
    fix = "Check this line and the one above"
    raise UserError(f"{file}:{line}", f"not valid YAML: {problem}", fix)
