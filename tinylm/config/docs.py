"""The reference of all settings, written from their fields: a page for people and a JSON schema for editors.

The schema is pydantic's own; the page is the schema told as tables, one a section, after an introduction whose examples
are loaded and whose errors are raised while it is written. Knows nothing of where the files end up.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from tinylm.common.errors import UserError
from tinylm.config.loader import load_config
from tinylm.config.messages import sections
from tinylm.config.schema import COUNT_LIMIT, Config

EXAMPLE = """\
# yaml-language-server: $schema=docs/config.schema.json
model:
  n_layers: 4
training:
  lr: 3e-4
  max_steps: 1e5
"""
EXAMPLE_CHILD = """\
extends: config.yaml
model:
  moe:
    n_experts: 4
"""
# Each is the example with one slip of the pen: what it was, what it became.
SLIPS = (
    ("  lr: 3e-4", "  lrr: 3e-4"),
    ("  lr: 3e-4", "  lr: fast"),
    ("  n_layers: 4", "  n_heads: 5"),
)

INTRODUCTION = """\
# Settings

Written by `python -m tinylm config-reference` from the fields in `tinylm/config/schema.py`; change them there.

A config is a YAML file with the sections below. Every setting has a default, so a file says only what differs:

```yaml
{example}```

The first line is for editors that speak yaml-language-server: they complete and check the settings as you type. The path
in it is relative to the YAML file. Numbers are decimal, and `3e-4` and `1e5` are numbers. A setting that would be
off or worked out by the program is `null`.

**A file can extend another.** Its settings come on top of those of the file it names (a path relative to itself), setting
by setting; a list replaces a list. Here the other file is the one above:

```yaml
{child}```

**The command line comes last.** After its options a program takes `section.key=value`, the value written as in YAML:

    training.max_steps=100 model.moe.top_k=1 'training.loggers=[tensorboard]'

**A mistake is one line** with the file, the line in it, the key, what was found and what would do, and the program
exits with 2 before it does anything else. For example, from the first file above with one word changed each time:

```text
{errors}
```
"""


def reference_files() -> dict[str, str]:
    """The name and the text of each generated file."""
    schema = config_schema()
    return {
        "CONFIG_REFERENCE.md": reference_page(schema),
        "config.schema.json": json.dumps(schema, indent=2, ensure_ascii=False) + "\n",
    }


def config_schema() -> dict[str, Any]:
    """The JSON schema of a config file: that of `Config`, and `extends`."""
    schema = Config.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        section.pop("title")  # pydantic's titles repeat the names
        for setting in section["properties"].values():
            setting.pop("title", None)
    extends = {
        "type": "string",
        "description": "path of a config file, relative to this one, whose settings this file's come on top of",
    }
    schema["properties"] = {"extends": extends, **schema["properties"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Tiny Transformer config",
        **schema,
    }


def reference_page(schema: dict[str, Any]) -> str:
    """The schema as a Markdown page."""
    errors = "\n".join(_error_of(EXAMPLE.replace(*slip)) for slip in SLIPS)
    parts = [INTRODUCTION.format(example=EXAMPLE, child=EXAMPLE_CHILD, errors=errors)]
    for key, section in sections():
        if section is not Config:
            parts.append(_section_table(key, schema["$defs"][section.__name__]))
    return "\n".join(parts)


def _section_table(key: str, section: dict[str, Any]) -> str:
    lines = [
        f"## {key}",
        "",
        section["description"],
        "",
        "| setting | value | default | meaning |",
        "|---|---|---|---|",
    ]
    for name, setting in section["properties"].items():
        meaning = (
            setting["description"].replace("<", "&lt;").replace("|", "\\|")
        )  # neither HTML nor a column
        lines.append(
            f"| `{name}` | {_type(setting, f'{key}.{name}')} | {_default(setting)} | {meaning} |"
        )
    return "\n".join([*lines, ""])


def _default(setting: dict[str, Any]) -> str:
    """The value that a setting has where nobody writes it."""
    if "default" not in setting:
        return "none: write it"
    return f"`{setting['default'] if isinstance(setting['default'], str) else json.dumps(setting['default'])}`"


def _type(setting: dict[str, Any], key: str) -> str:
    """What a setting can be, in words.

    >>> _type({"anyOf": [{"type": "integer", "minimum": 1, "maximum": 9}, {"type": "null"}]}, "")
    'whole number ≥ 1, ≤ 9, or `null`'
    >>> _type({"enum": ["pre", "post"]}, ""), _type({"type": "array", "items": {"type": "string"}}, "")
    ('`pre`, `post`', 'list of text')
    """
    if "anyOf" in setting:
        first, *others = (_type(choice, key) for choice in setting["anyOf"])
        return ", or ".join([first, *others])
    if "enum" in setting:
        return ", ".join(dict.fromkeys(f"`{value}`" for value in setting["enum"]))
    if "$ref" in setting:
        return f"section [{key}](#{key.replace('.', '')})"
    if "prefixItems" in setting:
        return f"list of {len(setting['prefixItems'])}: {_type(setting['prefixItems'][0], key)}"
    if setting.get("type") == "object":
        return "mapping of text to text"
    if "items" in setting:
        return f"list of {_type(setting['items'], key)}"
    words = {
        "integer": "whole number",
        "number": "number",
        "boolean": "`true`, `false`",
        "string": "text",
        "null": "`null`",
    }
    return " ".join([words[setting["type"]], _bounds(setting)]).strip()


def _bounds(setting: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return ", ".join(
        f"{sign} {setting[name]:.12g}"
        for name, sign in signs.items()
        if name in setting and setting[name] != COUNT_LIMIT
    )


def _error_of(text: str) -> str:
    """The line that a program prints for a config.yaml with this text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(text, encoding="utf-8")
        try:
            load_config(path)
        except UserError as error:
            return f"error: {error}".replace(str(path), path.name)
    raise ValueError(f"no mistake in {text!r}")
