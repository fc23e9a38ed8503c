"""The columns of a row: the shapes of published data, and the conversation in each.

    {"instruction", "input", "output"}      alpaca; the input may be missing or empty; also response
    {"prompt", "completion"}                prompt; also question, and response, answer or target
    {"messages": [{"role", "content"}]}     messages
    {"conversations": [{"from", "value"}]}  sharegpt; turns may have either pair of keys
    {"label", "text"}                       sms: a line of SMSSpamCollection

data.rows names the shape, or the keys of a row decide (auto). data.columns maps our names to those
in the data. A row of another shape is an error that names the key. Beside these keys a row can have
`system`, the text of a system turn; a turn can have `weight`, 0 for an answer that is not trained,
and its text can be a list of parts of type text. Tool calls are an error, but for those of the
calculator with data.tools (tool_messages.py). What is in no turn is
named by `unread_columns`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tinylm.common.errors import UserError
from tinylm.config.schema import DataConfig
from tinylm.rows.conversation import Conversation, Role, Turn
from tinylm.rows.skipped_rows import RowReport
from tinylm.rows.tool_messages import join_tool_messages
from tinylm.text.row_text import DOCUMENTS_ARE_FOR, is_blank, kind_of, some_of

Shape = Literal["alpaca", "prompt", "messages", "sharegpt", "sms"]
# Our name of each column: the names that published data have for it.
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
    "system": ("system", "system_prompt"),
    "label": ("label",),
}
# The columns that a row of each shape is read from.
_READ: dict[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "input", "output"),
    "prompt": ("prompt", "completion"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
}
# The column that decides the shape of a row, the most specific first.
_SHAPE_OF_COLUMN: dict[str, Shape] = {
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
CORRECT = "Correct the row, or remove it"
_TOOL_ROLES = ("tool", "function", "ipython", "observation", "function_call", "tool_call")
NO_TOOLS = "Remove rows with tool calls"


def parse_conversation(row: dict[str, Any], data: DataConfig) -> Conversation:
    """The conversation in a row of the shape that data.rows names or its keys decide.

    Raises:
        UserError: a key is missing, null, of another type or empty, or a role is unknown;
            `where` is the key.
    """
    columns = Columns(row, data.columns or {})
    conversation: Conversation
    match _shape(columns) if data.rows == "auto" else data.rows:
        case "alpaca":
            question = Turn("user", columns.text("instruction"), columns.optional_text("input"))
            conversation = question, Turn("assistant", columns.text("output"))
        case "prompt":
            question = Turn("user", columns.text("prompt"))
            conversation = question, Turn("assistant", columns.text("completion"))
        case "messages":
            conversation = _turns_with_answer(columns, "messages", data.tools)
        case "sharegpt":
            conversation = _turns_with_answer(columns, "conversations", data.tools)
        case _:
            conversation = _sms_conversation(row)
    return with_system(columns, conversation)


def read_conversation(
    row: dict[str, Any],
    data: DataConfig,
    report: RowReport,
    to_conversation: Callable[[dict[str, Any]], Conversation] | None,
) -> Conversation:
    """The conversation of a row as a task has it, or else by its keys, with its unread columns in
    the report; raises as `parse_conversation`.
    """
    if to_conversation is not None:
        return to_conversation(row)
    conversation = parse_conversation(row, data)
    report.unread_columns |= dict.fromkeys(unread_columns(row, data))
    return conversation


def unread_columns(row: dict[str, Any], data: DataConfig, *also: str) -> list[str]:
    """What `parse_conversation` ignores in a row: perhaps a question lacks its context.
    `also` are columns read elsewhere.
    """
    columns = Columns(row, data.columns or {})
    if is_sms(row, data):
        return columns.unread("label", "system", names=("text",))
    shape = _shape(columns) if data.rows == "auto" else data.rows
    return columns.unread(*_READ[shape], "system", *also)


def is_sms(row: dict[str, Any], data: DataConfig) -> bool:
    """Whether the label of a row is its answer."""
    return data.rows == "auto" and _shape(Columns(row, data.columns or {})) == "sms"


@dataclass(frozen=True)
class Columns:
    """The values of a row by our names of its columns."""

    row: dict[str, Any]
    names: dict[str, str]
    """data.columns"""

    def find(self, ours: str) -> str | None:
        """The row's own name of this column; None if it has none."""
        candidates = (self.names[ours],) if ours in self.names else COLUMNS[ours]
        return next((name for name in candidates if name in self.row), None)

    def value(self, ours: str) -> tuple[str, Any]:
        """The row's own name of this column, and the value in it."""
        name = self.find(ours)
        if name is None:
            raise UserError(
                self.names.get(ours, " or ".join(COLUMNS[ours])),
                f"missing; the row has {some_of(self.row)}",
                f"Add it, or set data.columns: {{{ours}: its name in the data}}",
            )
        return name, self.row[name]

    def text(self, ours: str) -> str:
        """A text that is not blank."""
        return require_text(*self.value(ours))

    def optional_text(self, ours: str) -> str:
        """A text, or "" if the column is missing, null or blank."""
        name = self.find(ours)
        if name is None and ours not in self.names:
            return ""
        name, value = self.value(ours)
        if value is None or (isinstance(value, str) and is_blank(value)):
            return ""
        return require_text(name, value)

    def unread(self, *ours: str, names: Sequence[str] = ()) -> list[str]:
        """The columns besides these that are not empty,
        then the keys of turns that `parse_turn` ignores.
        """
        read = {self.find(name) for name in ours} | set(names)
        unread = {}
        for name, value in self.row.items():
            if name not in read and not _is_empty(value):
                unread[name] = None
            elif name in read and isinstance(value, list):
                unread |= dict.fromkeys(_unread_turn_keys(name, value))
        return list(unread)


def _is_empty(value: Any) -> bool:
    """Whether a value says nothing: a table has every column in every row."""
    return (
        value is None or value == [] or value == {} or (isinstance(value, str) and is_blank(value))
    )


def _unread_turn_keys(name: str, items: list[Any]) -> Iterator[str]:
    for item in items:
        if not isinstance(item, dict):
            continue
        role_key, text_key = turn_keys(item)
        read = {role_key, text_key}
        if _ROLES.get(item.get(role_key, "")) == "assistant":
            read |= {"weight", "tool_calls"}
        elif item.get(role_key) == "tool":
            read |= {"tool_call_id", "name"}
        for key, value in item.items():
            if key not in read and not _is_empty(value):
                yield f"{name}[].{key}"


def with_system(columns: Columns, conversation: Conversation) -> Conversation:
    """The conversation after the system turn that a column of the row has, if it has one."""
    text = columns.optional_text("system")
    if not text:
        return conversation
    if conversation and conversation[0].role == "system":
        if conversation[0].text == text:
            return conversation
        problem = "the turns begin with another system turn"
        raise UserError(columns.value("system")[0], problem, "Keep one of the two")
    return (Turn("system", text), *conversation)


def require_text(key: str, value: Any) -> str:
    """The value, if it is a text that is not blank.

    Raises:
        UserError: it is not.
    """
    if not isinstance(value, str):
        raise UserError(key, f"must be a string, got {kind_of(value)}", CORRECT)
    if is_blank(value):
        raise UserError(key, "must not be empty", CORRECT)
    return value


def _shape(columns: Columns) -> Shape:
    present = [name for name in _SHAPE_OF_COLUMN if columns.find(name) is not None]
    if present:
        # A table has every column in every row; those of other shapes are null.
        name = min(present, key=lambda name: columns.value(name)[1] is None)
        return _SHAPE_OF_COLUMN[name]
    if {"label", "text"} <= columns.row.keys():
        return "sms"
    known = "instruction and output, prompt and completion, messages, or conversations"
    raise UserError(
        "row",
        f"must have {known}; it has {some_of(columns.row)}",
        f"Name its columns, for example data.columns: {{prompt: question}}. {DOCUMENTS_ARE_FOR}",
    )


def _sms_conversation(row: dict[str, Any]) -> Conversation:
    label = require_text("label", row["label"])
    if label not in ("ham", "spam"):
        raise UserError("label", f"must be ham or spam, got {label}", CORRECT)
    return Turn("user", SMS_INSTRUCTION, require_text("text", row["text"])), Turn(
        "assistant", label
    )


def _turns_with_answer(columns: Columns, ours: str, tools: str | None) -> Conversation:
    """The turns in a list of objects, at least one of them the assistant's."""
    name, items = columns.value(ours)
    if not isinstance(items, list):
        problem = f"must be a list of turns, got {kind_of(items)}"
        raise UserError(name, problem, "Correct the row, or set data.rows")
    turns = (
        parse_turns(name, items) if tools is None else join_tool_messages(name, items, parse_turn)
    )
    if not any(turn.role == "assistant" for turn in turns):
        problem = f"none of {len(turns)} turns is the assistant's"
        raise UserError(name, problem, "Add an answer, or remove the row")
    return turns


def parse_turns(name: str, items: list[Any]) -> Conversation:
    """The turns in a list of objects, which is the column `name`."""
    return tuple(parse_turn(item, f"{name}[{number}]") for number, item in enumerate(items))


def turn_keys(item: dict[str, Any]) -> tuple[str, str]:
    """The keys of a turn's role and text: ShareGPT's or OpenAI's, whatever the column is called."""
    if item.get("role") is None and "from" in item:
        return "from", "value"
    return "role", "content"


def parse_turn(item: Any, where: str) -> Turn:
    """The turn in an object with a role and a text."""
    if not isinstance(item, dict):
        problem = f"must be an object with role and content, got {kind_of(item)}"
        raise UserError(where, problem, "Correct the row")
    role_key, text_key = turn_keys(item)
    for key in (role_key, text_key):
        if key not in item:
            problem = f"missing; the turn has {some_of(item)}"
            raise UserError(f"{where}.{key}", problem, "Add it, or remove the row")
    role = item[role_key]
    if not isinstance(role, str) or role not in _ROLES:
        got = role if isinstance(role, str) else kind_of(role)
        problem = f"must be one of {', '.join(_ROLES)}, got {got}"
        raise UserError(f"{where}.{role_key}", problem, NO_TOOLS if got in _TOOL_ROLES else CORRECT)
    for key in ("tool_calls", "function_call"):
        if not _is_empty(item.get(key)):
            raise UserError(f"{where}.{key}", "tool calls are not supported", NO_TOOLS)
    text = _text_of(f"{where}.{text_key}", item[text_key])
    is_trained = _ROLES[role] != "assistant" or _weight(f"{where}.weight", item.get("weight")) == 1
    return Turn(_ROLES[role], text, trained=is_trained)


def _text_of(where: str, value: Any) -> str:
    """The text of a turn: a string, or a list of parts of type text, which are joined."""
    if not isinstance(value, list):
        return require_text(where, value)
    text = ""
    for number, part in enumerate(value):
        if not isinstance(part, dict):
            problem = f"must be an object with type and text, got {kind_of(part)}"
            raise UserError(f"{where}[{number}]", problem, CORRECT)
        kind, part_text = part.get("type"), part.get("text")
        if kind != "text":
            problem = f"must be text, got {kind if isinstance(kind, str) else kind_of(kind)}"
            raise UserError(f"{where}[{number}].type", problem, CORRECT)
        if not isinstance(part_text, str):
            problem = f"must be a string, got {kind_of(part_text)}"
            raise UserError(f"{where}[{number}].text", problem, CORRECT)
        text += part_text
    return require_text(where, text)


def _weight(where: str, value: Any) -> float:
    """OpenAI's weight of an assistant's message: 1, also if it is missing or null, or 0,
    not trained.
    """
    if value is None:
        return 1
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in (0, 1):
        got = value if isinstance(value, int | float) else kind_of(value)
        problem = f"must be 1 (trained) or 0 (not trained), got {got}"
        raise UserError(where, problem, CORRECT)
    return value
