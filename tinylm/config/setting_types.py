"""Which settings are text: an override of one is taken as typed, without the rules of YAML."""

from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from tinylm.config.schema import Config, Section


def is_text(key: str) -> bool:
    """Whether every value of the setting `key` (dotted), other than null, is text.

    >>> is_text("data.document_separator"), is_text("hardware.precision"), is_text("data.columns.prompt")
    (True, True, True)
    >>> is_text("training.max_steps"), is_text("training.loggers"), is_text("model.moe"), is_text("a.b")
    (False, False, False, False)
    """
    kinds: list[Any] = [Config]
    for name in key.split("."):
        kinds = [part for kind in kinds for part in _members(kind, name)]
    return bool(kinds) and all(kind is str for kind in kinds)


def _members(kind: Any, name: str) -> list[Any]:
    """The types of the part `name` of a section or mapping, without null;
    none if it has no such part.
    """
    if isinstance(kind, type) and issubclass(kind, Section):
        field = kind.model_fields.get(name)
        return [] if field is None else _alternatives(field.annotation)
    if get_origin(kind) is dict:
        return _alternatives(get_args(kind)[1])
    return []


def _alternatives(annotation: Any) -> list[Any]:
    """The types that a union allows, without null; text for a choice of names."""
    if annotation is NoneType:
        return []
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _alternatives(arguments[0])
    if origin is Literal:
        return [type(argument) for argument in arguments]
    if arguments and origin not in (tuple, dict):
        return [kind for argument in arguments for kind in _alternatives(argument)]
    return [annotation]
