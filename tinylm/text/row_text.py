"""The document in a row, which is an object with a text in one of its fields.

Knows nothing of files: the readers give rows and where they are.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from tinylm.common.errors import UserError, reject_lone_surrogates

_JSON_NAMES = {
    bool: "a boolean",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
    str: "a string",
}

# Keys and files of rows for fine-tuning, which have no documents, and what to do with them.
ROW_KEYS = {"instruction", "messages", "conversations", "prompt", "question", "chosen"}
ROW_ONLY_FILES = ("SMSSpamCollection",)
ROWS_ARE_FOR = "Rows of questions and answers are for finetune.py"
DOCUMENTS_ARE_FOR = "Documents are for train.py"


def field_texts(rows: Iterable[tuple[object, Any]], field: str) -> Iterator[str]:
    """The document of each row that has one and is not blank."""
    for location, row in rows:
        try:
            text = _text_of(row, field)
        except UserError as error:
            raise error.within(location) from None
        if not is_blank(text):
            yield text


def _text_of(row: Any, field: str) -> str:
    """The document in a row."""
    fix = ("Correct the row, or set {} to the key that holds the text", "data.text_field")
    if not isinstance(row, dict):
        problem = f'expected an object such as {{"{field}": "..."}}, found {kind_of(row)}'
        raise UserError((), problem, *fix)
    if field not in row:
        if ROW_KEYS & row.keys():
            fix = (f"{fix[0]}. {ROWS_ARE_FOR}", *fix[1:])
        raise UserError(field, f"missing; the row has {some_of(row)}", *fix)
    text = row[field]
    if not isinstance(text, str):
        raise UserError(field, f"expected a string, found {kind_of(text)}", *fix)
    try:
        reject_lone_surrogates(text)
    except UserError as error:
        raise error.within(field) from None
    return text


def no_column(where: object, field: str, columns: Iterable[str]) -> UserError:
    """The error to raise if a dataset does not have the text column."""
    problem = f"no such column; there are {some_of(columns)}"
    fix = "Set {} to the one that holds the text"
    return UserError((where, field), problem, fix, "data.text_field")


def is_blank(text: str) -> bool:
    return not text or text.isspace()


def some_of(names: Iterable[str]) -> str:
    """The first 20 names, for a message of one line."""
    return ", ".join(map(str, islice(names, 20))) or "no keys"


def kind_of(value: Any) -> str:
    return _JSON_NAMES.get(type(value), type(value).__name__)
