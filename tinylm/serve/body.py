"""The body of a request: bytes to a model of schema.py, or an error that names the field.

No body may keep the server from answering others: its depth and its number of parts are bounded before
it is parsed, and a large one is parsed in another thread than the event loop's.
"""

import asyncio
import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from tinylm.common.errors import printable
from tinylm.serve.errors import ApiError, bad_request

MAX_DEPTH = 64
MAX_DIGITS = 40
MAX_PARTS = 100_000
"""strings, and beginnings and ends of lists and objects"""
LARGE = 64 * 1024
STRUCTURE = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)

SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

Model = TypeVar("Model", bound=BaseModel)


class BodyReader:
    """Reads the bodies of all requests of a server; of the large ones, one at a time."""

    def __init__(self) -> None:
        self._large = asyncio.Lock()

    async def read(self, request: Request, model: type[Model]) -> Model:
        """The request; raises as `parse_body`."""
        body = await request.body()
        if len(body) <= LARGE:
            return parse_body(body, model)
        async with self._large:
            return await asyncio.to_thread(parse_body, body, model)


def parse_body(body: bytes, model: type[Model]) -> Model:
    """The request in a JSON body.

    Raises:
        ApiError: it is not JSON, or a field is missing, unknown or wrong.
    """
    return validated(parse_json(body), model)


def parse_json(body: bytes) -> dict[str, Any]:
    """The object in a JSON body: RFC 8259, without what parsers read differently.

    >>> parse_json(b'{"n": 1}')
    {'n': 1}
    """
    if not body:
        raise bad_request("The body is empty; it must be a JSON object.")
    require_simple(body)
    try:
        text = body.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_reject_constant,
            parse_int=_integer,
            parse_float=_float,
        )
        if SURROGATE.search(body):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise bad_request("The body has half of a surrogate pair, which is no character.") from None
    except UnicodeDecodeError as error:
        raise bad_request(f"The body is not UTF-8 (byte {error.start}).") from None
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise bad_request(f"The body is not JSON: {problem}.") from None
    if not isinstance(value, dict):
        raise bad_request("The body must be a JSON object.")
    return value


def require_simple(body: bytes) -> None:
    """Raise an ApiError if lists and objects are nested deeper than Python's parser may recurse, or
    if there are more parts than any request needs: each takes 20 times its length in memory.
    """
    depth = 0
    for number, found in enumerate(STRUCTURE.finditer(body)):
        if number == MAX_PARTS:
            raise bad_request(f"The body has more than {MAX_PARTS} strings, lists and objects.")
        first = found[0][:1]
        if first == b'"':
            continue
        depth += 1 if first in b"[{" else -1
        if depth > MAX_DEPTH:
            raise bad_request(f"The body is nested more than {MAX_DEPTH} levels deep.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise bad_request(
                f"The key {printable(name[:80])} appears twice.", printable(name[:80])
            )
        found[name] = value
    return found


def _reject_constant(name: str) -> float:
    raise bad_request(f"The body is not JSON: {name} is not a number.")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise bad_request(f"A number has more than {MAX_DIGITS} digits.")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise bad_request("A number is too large.")
    return value


def validated(value: dict[str, Any], model: type[Model]) -> Model:
    """The request with these fields."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _first_problem(error, model) from None


def _first_problem(error: ValidationError, model: type[BaseModel]) -> ApiError:
    """The first wrong field, without the value: it may be long or secret."""
    errors = error.errors(include_url=False, include_input=False)
    # Of a union, each member has errors; the deepest one is of the member that fits best.
    of_field = [found for found in errors if found["loc"][:1] == errors[0]["loc"][:1]]
    first = max(of_field, key=lambda found: len(found["loc"]))
    parts = list(first["loc"])
    # Of a union, the name of a member follows the field; a user does not know it.
    shown = [part for part in parts if isinstance(part, int) or _is_field_name(part)]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in shown)
    name = printable(name.lstrip(".")[:80]) or None
    if first["type"] == "extra_forbidden":
        return bad_request(f"There is no parameter {name}.", name, "unknown_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return bad_request(f"{name or 'The body'}: {message}.", name)


def _is_field_name(part: str) -> bool:
    return re.fullmatch(r"[A-Za-z_]\w*", part) is not None and part not in UNION_MEMBERS


# Pydantic's names of the members of our unions.
UNION_MEMBERS = frozenset({"str", "bool", "int", "TextPart", "constrained-str"})
