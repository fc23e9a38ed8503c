from dataclasses import dataclass
from typing import Any, Literal

from tinylm.common.errors import UserError, printable
from tinylm.config.schema import DataConfig
from tinylm.rows.conversation import Conversation, Role, Turn
from tinylm.text.documents import is_blank, kind_of, some_of

Kind = Literal["alpaca", "prompt", "messages", "sharegpt", "sms"]
# Our name of each column, and the names that published data have for it.
COLUMNS = {
    "instruction": ("instruction",),
    "input": ("input",),
    "output": ("output", "response"),
    "prompt": ("prompt", "question"),
    "completion": ("completion", "response", "answer", "target"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
}
# What a row of each kind is made of.
_READ: dict[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "input", "output"),
    "prompt": ("prompt", "completion"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
}
# The column that tells a row's kind, the surest sign first.
_SIGNS: dict[str, Kind] = {
    "messages": "messages",
    "conversations": "sharegpt",
    "instruction": "alpaca",
    "prompt": "prompt",
}
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "human": "user",
    "gpt": "assistant",
}
SMS_INSTRUCTION = "classify if the SMS is spam or ham"


def parse_conversation(row: dict[str, Any], data: DataConfig) -> Conversation:
    """The conversation in a row, of the kind that data.rows says or that its keys tell.

    Raises:
        UserError: naming the key and what is wrong: it is missing, null, of another type or empty, or a role is unknown.
    """
    columns = _Columns(row, data.columns or {})
    match _kind_of_row(columns) if data.rows == "auto" else data.rows:
        case "alpaca":
            return Turn("user", columns.text("instruction"), columns.optional_text("input")), Turn(
                "assistant", columns.text("output")
            )
        case "prompt":
            return Turn("user", columns.text("prompt")), Turn(
                "assistant", columns.text("completion")
            )
        case "messages":
            return _turns(columns, "messages")
        case "sharegpt":
            return _turns(columns, "conversations")
        case _:
            return _sms_conversation(row)


def unread_text_columns(row: dict[str, Any], data: DataConfig) -> list[str]:
    """The columns with text that `parse_conversation` makes no turn of: perhaps a question lacks what stands there."""
    columns = _Columns(row, data.columns or {})
    kind = _kind_of_row(columns) if data.rows == "auto" else data.rows
    read = {"label", "text"} if kind == "sms" else {columns.find(ours) for ours in _READ[kind]}
    return [
        name
        for name, value in row.items()
        if name not in read and isinstance(value, str) and not is_blank(value)
    ]


@dataclass(frozen=True)
class _Columns:
    """The values of a row by our names of its columns."""

    row: dict[str, Any]
    names: dict[str, str]

    def find(self, ours: str) -> str | None:
        """What the row calls this column; None if it has none."""
        theirs = (self.names[ours],) if ours in self.names else COLUMNS[ours]
        return next((name for name in theirs if name in self.row), None)

    def value(self, ours: str) -> tuple[str, Any]:
        """What the row calls this column, and what is in it."""
        name = self.find(ours)
        if name is None:
            wanted = printable(self.names.get(ours, " or ".join(COLUMNS[ours])))
            raise UserError(
                f"{wanted}: missing; the row has {some_of(self.row)}. Add it, or set data.columns: {{{ours}: its name in the data}}."
            )
        return name, self.row[name]

    def text(self, ours: str) -> str:
        """A text that is not blank."""
        return _text(*self.value(ours))

    def optional_text(self, ours: str) -> str:
        """A text, or nothing where the column is missing, null or blank."""
        name = self.find(ours)
        if name is None and ours not in self.names:
            return ""
        name, value = self.value(ours)
        return (
            ""
            if value is None or (isinstance(value, str) and is_blank(value))
            else _text(name, value)
        )


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(
            f"{printable(key)}: expected a string, found {kind_of(value)}. Correct the row, or take it out."
        )
    if is_blank(value):
        raise UserError(f"{printable(key)}: it is empty. Write it, or take the row out.")
    return value


def _kind_of_row(columns: _Columns) -> Kind:
    present = [sign for sign in _SIGNS if columns.find(sign) is not None]
    # A table has every column in every row: what another kind of row would have is null.
    if present:
        return _SIGNS[min(present, key=lambda sign: columns.value(sign)[1] is None)]
    if {"label", "text"} <= columns.row.keys():
        return "sms"
    known = "instruction and output, prompt and completion, messages, or conversations"
    raise UserError(
        f"expected {known}; the row has {some_of(columns.row)}. Name its columns, for example data.columns: {{prompt: question}}."
    )


def _sms_conversation(row: dict[str, Any]) -> Conversation:
    """S0's triplet of a message."""
    label = _text("label", row["label"])
    if label not in ("ham", "spam"):
        raise UserError(
            f"label: expected ham or spam, found {printable(label)}. Correct the row, or take it out."
        )
    return Turn("user", SMS_INSTRUCTION, _text("text", row["text"])), Turn("assistant", label)


def _turns(columns: _Columns, ours: str) -> Conversation:
    """The turns in a list of objects, at least one of them the assistant's."""
    name, items = columns.value(ours)
    if not isinstance(items, list):
        raise UserError(
            f"{printable(name)}: expected a list of turns, found {kind_of(items)}. Correct the row, or set data.rows."
        )
    turns = _turns_in(name, items)
    if not any(turn.role == "assistant" for turn in turns):
        raise UserError(
            f"{printable(name)}: no turn of the assistant among {len(turns)}. Add an answer, or take the row out."
        )
    return turns


def _turns_in(name: str, items: list[Any]) -> Conversation:
    return tuple(_turn(item, f"{printable(name)}[{number}]") for number, item in enumerate(items))


def _keys_of_turn(item: dict[str, Any]) -> tuple[str, str]:
    """What a turn calls its side and its text: ShareGPT's words or OpenAI's, whatever the column is called."""
    return ("from", "value") if item.get("role") is None and "from" in item else ("role", "content")


def _turn(item: Any, where: str) -> Turn:
    if not isinstance(item, dict):
        raise UserError(
            f"{where}: expected an object with role and content, found {kind_of(item)}. Correct the row."
        )
    role_key, text_key = _keys_of_turn(item)
    for key in (role_key, text_key):
        if key not in item:
            raise UserError(
                f"{where}.{key}: missing; the turn has {some_of(item)}. Add it, or take the row out."
            )
    role = item[role_key]
    if not isinstance(role, str) or role not in _ROLES:
        found = printable(role) if isinstance(role, str) else kind_of(role)
        raise UserError(
            f"{where}.{role_key}: expected {', '.join(_ROLES)}, found {found}. Correct the row, or take it out."
        )
    return Turn(_ROLES[role], _text(f"{where}.{text_key}", item[text_key]))
