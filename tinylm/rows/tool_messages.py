"""Rows with tool messages, as OpenAI's format has them, as answers with calls in their text
(data.tools).

    {"role": "assistant", "content": "There are ", "tool_calls": [{"function":
        {"name": "calculator", "arguments": "{\\"expression\\": \\"4*6\\"}"}}]}
    {"role": "tool", "content": "24"}
    {"role": "assistant", "content": "24 eggs."}

are one turn of the assistant: There are <<4*6=24>>24 eggs.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tinylm.common.errors import UserError
from tinylm.rows.conversation import Conversation, Turn
from tinylm.rows.tool_calls import calls_in

CALCULATOR = "calculator"
_FIX = "Correct the row, or remove it"


def join_tool_messages(
    name: str, items: list[Any], parse_turn: Callable[[Any, str], Turn]
) -> Conversation:
    """The turns in a list of objects, which is the column `name`.

    Raises:
        UserError: as `parse_turn`; a call is not one of the calculator, or has no result; or a result
        has no call.
    """
    turns: list[Turn] = []
    expression = None  # of the call that waits for its result
    continues = False  # whether an assistant's message continues the turn before
    for number, item in enumerate(items):
        where = f"{name}[{number}]"
        role = item.get("role") if isinstance(item, dict) else None
        if expression is not None and role != "tool":
            raise UserError(where, "must be the result of the call before it, a tool message", _FIX)
        if role == "tool":
            if expression is None:
                raise UserError(where, "a tool message must follow a message with a call", _FIX)
            call = f"<<{expression}={parse_turn({**item, 'role': 'user'}, where).text}>>"
            if not calls_in(call):
                raise UserError(
                    where, "the result of a call must be one line without < and >", _FIX
                )
            turns[-1] = replace(turns[-1], text=turns[-1].text + call)
            expression, continues = None, True
            continue
        turn, expression = _turn_and_call(item, where, parse_turn)
        if continues and role == "assistant":
            if turn.trained != turns[-1].trained:
                problem = "must be that of the message before the call"
                raise UserError(f"{where}.weight", problem, _FIX)
            turns[-1] = replace(turns[-1], text=turns[-1].text + turn.text)
        else:
            turns.append(turn)
        continues = False
    if expression is not None:
        raise UserError(f"{name}[{len(items) - 1}]", "the call has no result", _FIX)
    return tuple(turns)


def _turn_and_call(
    item: Any, where: str, parse_turn: Callable[[Any, str], Turn]
) -> tuple[Turn, str | None]:
    """The turn of an object without its call, and the expression of the call."""
    calls = item.get("tool_calls") if isinstance(item, dict) else None
    if not calls or item.get("role") != "assistant":
        return parse_turn(item, where), None
    expression = _expression(calls, f"{where}.tool_calls")
    rest = {key: value for key, value in item.items() if key != "tool_calls"}
    if rest.get("content") in (None, "", []):  # a message may be the call alone
        return replace(parse_turn({**rest, "content": "-"}, where), text=""), expression
    return parse_turn(rest, where), expression


def _expression(calls: Any, where: str) -> str:
    """The expression of the only call."""
    if not isinstance(calls, list) or len(calls) != 1 or not isinstance(calls[0], dict):
        raise UserError(where, "must be a list of one call", "Write a message for each call")
    function = calls[0].get("function")
    if not isinstance(function, dict) or function.get("name") != CALCULATOR:
        problem = f"must call the function {CALCULATOR}"
        raise UserError(f"{where}[0].function", problem, "Remove rows with other tools")
    where = f"{where}[0].function.arguments"
    arguments = function.get("arguments")
    try:
        given = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        raise UserError(where, "is not JSON", _FIX) from None
    expression = given.get("expression") if isinstance(given, dict) else None
    if not isinstance(expression, str) or not calls_in(f"<<{expression}=>>"):
        problem = 'must be {"expression": TEXT} with digits and +-*/().% only'
        raise UserError(where, problem, _FIX)
    return expression
