"""From YAML files and the command line to a `Config`: the only way by which settings come in.

`load_config` stacks layers, of which the last one counts: the file that is extended, the file
itself, the overrides. The merged values are validated by `schema.py`; an error is explained by
`messages.py`.
"""

import glob
import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError

# config.depth is imported for a config that has one
from tinylm import config as settings
from tinylm.common.errors import UserError, not_found
from tinylm.common.hub import HF_PREFIX
from tinylm.config.messages import explain, explain_rule
from tinylm.config.model import MAX_LAYERS, ModelConfig
from tinylm.config.rules import RuleError
from tinylm.config.schema import SMOKE, Config, Section, TokenizerConfig
from tinylm.config.yaml_file import Layer, override_layer, read_layer

logger = logging.getLogger(__name__)

# A config in configs/recipes/ names data/x.txt, which is two folders above.
LEVELS_ABOVE = 3


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The settings in the YAML file `path`, merged over the files it extends,
    then the `section.key=value` overrides.

    Raises:
        UserError: with the file, the line, the key, what was found and what is expected.
    """
    # 1. the command line
    given = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            problem = "an override must be section.key=value"
            raise UserError(override, problem, "For example training.max_steps=100")
        given.append((key, text, is_text(key), is_text(key, items=True)))
    # 2. the layers, later ones count more
    files = _read_files(Path(path).expanduser(), ())
    typed = []
    for key, text, is_one, is_list in given:
        typed.append(override_layer(key, text, is_text=is_one, has_texts=is_list))
    # 3. one over the other
    values: dict[str, Any] = {}
    for _, changes in files:
        _merge(values, changes)
    for (key, *_), layer in zip(given, typed, strict=True):
        if key == "tokenizer.path" and isinstance(values.get("tokenizer"), dict):
            # It replaces a tokenizer that is trained, with all settings of the training.
            for name in ("kind", "vocab_size", "pattern", "learn_docs", "unknown"):
                values["tokenizer"].pop(name, None)
        _merge(values, layer.values(layer.node))
    # 4. what model.depth means; a value that it cannot have is an error of the validation
    layers = [*(layer for layer, _ in files), *typed]
    model = values.get("model")
    depth = model.get("depth") if isinstance(model, dict) else None
    if type(depth) is int and 1 <= depth <= MAX_LAYERS:
        try:
            values, line = settings.depth.resolve(values)
        except RuleError as broken:
            raise explain_rule("", broken, layers) from None
        logger.info(line)
    return _validated(values, layers)


def require_here(config: Config, file: str | Path, sections: str = "") -> None:
    """Raise a UserError for a relative path in `config` that is missing in the working folder,
    which it is relative to, but exists beside the config file or in a folder above.

    Args:
        config: the settings.
        file: the config file that they are from.
        sections: how the names of the settings begin that are needed; "": all of them.
    """
    named = [
        ("data.val_dataset", config.data.val_dataset),
        ("tokenizer.path", config.tokenizer.path),
        ("training.init_from", config.training.init_from),
    ]
    is_built_in = config.data.task is not None and config.data.dataset == SMOKE
    if config.data.mix is None and not is_built_in:
        named.insert(0, ("data.dataset", config.data.dataset))
    for i, part in enumerate(config.data.mix or ()):
        named.append((f"data.mix[{i}].dataset", part.dataset))
    if config.distill is not None:
        named.append(("distill.teacher", config.distill.teacher))
    if config.verifier is not None:
        named.append(("verifier.sampled_from", config.verifier.sampled_from))
    for setting, name in named:
        if name is not None and setting.startswith(sections):
            require_path_here(name.removeprefix(HF_PREFIX), file, setting)


def require_path_here(path: str, file: str | Path, setting: str, *where: object) -> None:
    """Raise a UserError, at `where`, if `path`, which the config `file` gives as `setting`,
    is as in `require_here`.
    """
    if os.path.isabs(path) or os.path.lexists(path) or glob.glob(path):
        return
    for folder in Path(file).expanduser().resolve().parents[:LEVELS_ABOVE]:
        found = os.path.join(folder, path)
        if os.path.exists(found) or glob.glob(found):
            problem = f"{not_found(path)}, but it is in {folder}"
            fix = f"Run the command in {folder}, or set {{}} to the whole path"
            raise UserError((*where, setting, path), problem, fix, setting)


def is_text(key: str, kind: Any = Config, *, items: bool = False) -> bool:
    """Whether every value of the setting `key` (dotted) of `kind`, other than null, is text:
    an override of it is taken as typed, without the rules of YAML.
    With `items`, whether it is a list of texts.

    >>> is_text("data.document_separator"), is_text("hardware.precision"), is_text("data.columns.prompt")
    (True, True, True)
    >>> is_text("training.max_steps"), is_text("training.loggers"), is_text("model.moe"), is_text("a.b")
    (False, False, False, False)
    >>> is_text("sampling.stop", items=True), is_text("training.run_name", items=True)
    (True, False)
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return is_text(key, arguments[0], items=items)
    if origin in (Union, UnionType):
        parts = [part for part in arguments if part is not NoneType]
        return all(is_text(key, part, items=items) for part in parts)
    if not key and items:
        return origin in (list, tuple) and is_text("", arguments[0])
    if not key:
        return kind is str or (origin is Literal and all(isinstance(x, str) for x in arguments))
    name, _, rest = key.partition(".")
    if origin is dict:
        return is_text(rest, arguments[1], items=items)
    if isinstance(kind, type) and issubclass(kind, Section) and name in kind.model_fields:
        return is_text(rest, kind.model_fields[name].annotation, items=items)
    return False


def with_model(config: Config, model: ModelConfig, tokenizer: TokenizerConfig) -> Config:
    """The settings of `config`; what its model and tokenizer sections do not set is taken
    from `model` and `tokenizer`.

    Each setting of the model counts separately, the tokenizer section as a whole; special tokens
    alone are added to those of `tokenizer`.

    Raises:
        UserError: the resulting settings contradict each other.
    """
    written = {
        name: value
        for name, value in config.model
        if name in config.model.model_fields_set and value is not None
    }
    written_tokenizer = config.tokenizer.model_fields_set
    if written_tokenizer == {"special_tokens"}:
        names = (*tokenizer.special_tokens, *config.tokenizer.special_tokens)
        tokenizer = tokenizer.model_copy(update={"special_tokens": tuple(dict.fromkeys(names))})
    merged = config.model_copy(
        update={
            "model": model.model_copy(update=written),
            "tokenizer": config.tokenizer if written_tokenizer - {"special_tokens"} else tokenizer,
        }
    )
    return _validated(merged.to_plain(), [])


def _read_files(path: Path, children: tuple[Path, ...]) -> list[tuple[Layer, dict[str, Any]]]:
    """The file that `path` extends, with what that extends, then `path` itself, each with its values;
    `children` are the files that led here.
    """
    layer = read_layer(path)
    if layer.node is None:
        fix = "Write the settings that differ from the defaults, for example model: {n_layers: 4}"
        raise UserError(path, "the file is empty", fix)
    found = layer.values(layer.node)
    if not isinstance(found, dict):
        problem = f"a config must have sections ({', '.join(Config.model_fields)})"
        fix = "Write each section's name: and its settings indented below it"
        raise UserError(layer.location(layer.node), problem, fix)
    extended = []
    if "extends" in found:
        children = (*children, path.resolve())
        parent = _extended(found.pop("extends"), path, str(layer.find("extends")), children)
        extended = _read_files(parent, children)
    return [*extended, (layer, found)]


def _extended(value: object, path: Path, location: str, children: Sequence[Path]) -> Path:
    """The file that `extends: value` in the file `path` names."""
    if not isinstance(value, str) or not value:
        problem = "must be the path of one YAML file"
        raise UserError((location, "extends"), problem, "Write it relative to this file")
    parent = path.parent / os.path.expanduser(value)
    # os.path: Path.is_file raises for a name that no file can have
    if not os.path.isfile(parent):
        fix = "Write the path relative to this file"
        raise UserError((location, "extends", parent), "not a file", fix)
    if parent.resolve() in children:
        problem = "circular, that file extends this one"
        raise UserError((location, "extends", parent), problem, "Remove one extends:")
    return parent


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> None:
    """Put `changes` over `values`: mappings key by key; everything else, lists included,
    is replaced.
    """
    for name, value in changes.items():
        if isinstance(value, dict):
            if not isinstance(values.get(name), dict):
                values[name] = {}
            _merge(values[name], value)
        else:
            values[name] = value


def _validated(values: dict[str, Any], layers: Sequence[Layer]) -> Config:
    """The values as `Config`, or the first mistake in them as a UserError with its location."""
    try:
        return Config.model_validate(values)
    except ValidationError as invalid:
        raise explain(invalid.errors()[0], layers) from None
