"""The two files of `infer.py --input`: the rows that are asked, and the answers to them.

    read_prompts   .txt, .jsonl, .csv or standard input ─▶ PromptRow, one per row
    AnswerFile     one JSON line per row, in the order of the rows, each written as soon as it is known

An answer file is continued: whole lines are kept, a line that a kill has cut is dropped. It belongs
to the input, checkpoints and settings that it was begun with, which are in a file beside it:

    answers.jsonl                {"prompt": "Once", "completions": [{"text": " upon", ...}]}
    answers.settings.json        the digest of the input, the weights' fingerprints, the settings

Knows nothing of models; answer_file.py asks them.
"""

import csv
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from filelock import Timeout

from tinylm.common.errors import UserError, first_line
from tinylm.common.files import locked, read_regular, write_atomic, writing
from tinylm.rows.columns import CORRECT, Columns, parse_turns, require_text, with_system
from tinylm.rows.conversation import Conversation, Turn
from tinylm.text.documents import json_value, text_lines
from tinylm.text.row_text import is_blank, kind_of, some_of

# What we add to a row; keys of these names in the input are dropped.
COMPLETIONS, CHECKPOINTS, ERROR = "completions", "checkpoints", "error"
RESULT_KEYS = (COMPLETIONS, CHECKPOINTS, ERROR)


@dataclass(frozen=True)
class PromptRow:
    """A row of the input."""

    location: object
    """FILE:LINE, for errors"""
    fields: dict[str, Any]
    """its keys and values, which the output keeps"""

    @property
    def text(self) -> str:
        """Its prompt; a UserError if it has none."""
        if self.fields.get("prompt") is None:
            problem = f"missing; the row has {some_of(self.fields)}"
            raise UserError("prompt", problem, "Add prompt or messages, or remove the row")
        return require_text("prompt", self.fields["prompt"])

    @property
    def has_messages(self) -> bool:
        """Whether it is a conversation. A table has every column in every row: null is none."""
        return self.fields.get("messages") is not None

    @property
    def conversation(self) -> Conversation:
        """Its messages, or its prompt as a question, after the row's own system text if it has one.

        Raises:
            UserError: it has neither, or the last message is not the user's.
        """
        turns: Conversation
        if self.has_messages:
            messages = self.fields["messages"]
            if not isinstance(messages, list):
                problem = f"must be a list of turns, got {kind_of(messages)}"
                raise UserError("messages", problem, CORRECT)
            turns = parse_turns("messages", messages)
            if not turns or turns[-1].role != "user":
                raise UserError("messages", "the last one must be the user's", CORRECT)
        else:
            turns = (Turn("user", self.text),)
        return with_system(Columns(self.fields, {}), turns)


@dataclass(frozen=True)
class BadRow:
    """A row of the input that is no object: it gets an error in place of an answer."""

    location: object
    error: UserError
    fields: dict[str, Any]


Rows = list[PromptRow | BadRow]


# --- the input ---


def read_prompts(path: Path) -> Rows:
    """The rows of a file or, for `-`, of standard input, which are JSON lines if the first of them
    is an object. Blank lines are skipped.

    Raises:
        UserError: the file cannot be read, is of another kind, or has no rows. A single row that is
        wrong is an error of that row.
    """
    if str(path) == "-":
        if sys.stdin is None:
            raise UserError("--input", "standard input is closed", "Give the path of a file")
        lines = numbered(read_stdin())
        is_json = next((line for _, line in lines if not is_blank(line)), "").startswith("{")
        rows = list(json_rows(lines) if is_json else plain_rows(lines))
    elif path.name.endswith((".txt", ".txt.gz")):
        rows = list(plain_rows(text_lines(path)))
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        rows = list(json_rows(text_lines(path)))
    elif path.name.endswith(".csv"):
        rows = list(csv_rows(path))
    else:
        problem = "must be a .txt, .jsonl or .csv file, or - for standard input"
        raise UserError(("--input", path), problem, "Rename or convert it")
    if not rows:
        raise UserError(("--input", path), "has no rows", "Write one prompt per line")
    return rows


def read_stdin() -> str:
    """The text of standard input, without its last newline."""
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            "standard input", f"not UTF-8 text (byte {error.start})", "Convert it to UTF-8"
        ) from None


def numbered(text: str) -> list[tuple[object, str]]:
    """The lines of standard input with their locations."""
    if text.startswith("\ufeff"):
        text = text[1:]
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    return [(f"standard input:{number}", line) for number, line in enumerate(lines, start=1)]


def plain_rows(lines: Iterable[tuple[object, str]]) -> Iterator[PromptRow]:
    """Each line as a prompt."""
    for location, line in lines:
        if not is_blank(line):
            yield PromptRow(location, {"prompt": line})


def json_rows(lines: Iterable[tuple[object, str]]) -> Iterator[PromptRow | BadRow]:
    """The object in each line."""
    for location, line in lines:
        if is_blank(line):
            continue
        try:
            value = json_value(line)
            if not isinstance(value, dict):
                problem = f'must be an object such as {{"prompt": "..."}}, got {kind_of(value)}'
                raise UserError((), problem, CORRECT)
        except UserError as error:
            yield BadRow(location, error, {"line": line})
        else:
            yield PromptRow(location, value)


def csv_rows(path: Path) -> Iterator[PromptRow | BadRow]:
    """The rows of a table whose first line names the columns; cells may have line ends.

    Raises:
        UserError: it is not UTF-8 text or not CSV, or has no column `prompt`.
    """
    try:
        text = read_regular(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 text (byte {error.start})"
        raise UserError(path, problem, "Save the file as UTF-8") from None
    csv.field_size_limit(2**31 - 1)
    table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = table.fieldnames or []
        if "prompt" not in columns:
            problem = f"has no column prompt; there are {some_of(columns)}"
            raise UserError(path, problem, "Rename the column that has the prompts")
        for row in table:
            location = f"{path}:{table.line_num}"
            surplus = row.pop(None, None)  # type: ignore[call-overload]
            if surplus is None:
                yield PromptRow(location, row)
                continue
            problem = (
                f"has {len(columns) + len(surplus)} cells, but there are {len(columns)} columns"
            )
            error = UserError((), problem, 'Put text with commas in quotes: "a, b"')
            yield BadRow(location, error, row)
    except csv.Error as error:
        problem = f"not CSV: {first_line(error)}"
        raise UserError(f"{path}:{table.reader.line_num}", problem, "Correct the line") from None


def own_keys(fields: dict[str, Any]) -> dict[str, Any]:
    """A row without what we add."""
    return {name: value for name, value in fields.items() if name not in RESULT_KEYS}


def digest_of(rows: Rows) -> str:
    """16 hex digits that identify the rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.fields).encode() + b"\n")
    return digest.hexdigest()[:16]


# --- the output ---


class AnswerFile:
    """The output, open to be continued by this process alone. Used in a `with` statement.

    Args:
        path: the file; it and its folder are made if missing.
        rows: the rows of the input.
        made_from: what the answers depend on, as plain values by name.
        described: more facts to write beside it, which may change.

    Raises:
        UserError: it belongs to something else, is damaged, is in use, or cannot be written.
    """

    def __init__(
        self, path: Path, rows: Rows, made_from: dict[str, Any], described: dict[str, Any]
    ):
        self.path, self.rows = path, rows
        self.settings = path.with_suffix(".settings.json")
        self.made_from = made_from
        self._described = described
        self.errors: list[str] = []
        """the first error of each row that has one"""
        self.n_done = 0
        """rows that have their line"""
        self._stack = ExitStack()
        self._file: BinaryIO | None = None

    def __enter__(self) -> "AnswerFile":
        try:
            self._stack.enter_context(locked(self.path, "--output", timeout=0))
        except Timeout:
            fix = "Wait for it, or choose another --output"
            raise UserError(self.path, "another process is writing it", fix) from None
        with self._stack:
            self._keep_whole_lines()
            with writing(self.path, "--output"):
                self._file = self._stack.enter_context(open(self.path, "ab"))
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, result: dict[str, Any]) -> None:
        """Write the line of the next row: its own keys, and the result."""
        fields = self.rows[self.n_done].fields
        line = own_keys(fields) | result
        with writing(self.path, "--output"):
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
        self._count(line)

    def _count(self, line: dict[str, Any]) -> None:
        results = (line, *line.get(CHECKPOINTS, ()))
        errors = [result[ERROR] for result in results if ERROR in result]
        self.errors += errors[:1]
        self.n_done += 1

    def _keep_whole_lines(self) -> None:
        """Count the lines that are there, and drop one that was cut; or begin the file."""
        raw = read_regular(self.path) if os.path.lexists(self.path) else b""
        if not raw:
            facts = {"made_from": self.made_from, **self._described}
            write_atomic(self.settings, json.dumps(facts, indent=2) + "\n", "--output")
            return
        self._require_same()
        whole = raw[: raw.rfind(b"\n") + 1]
        for number, text in enumerate(whole.splitlines(), start=1):
            if number > len(self.rows):
                self._refuse(f"has more lines than the input has rows ({len(self.rows)})")
            row = self.rows[number - 1]
            try:
                line = json.loads(text)
                is_of_row = json.dumps(own_keys(line)) == json.dumps(own_keys(row.fields))
                if is_of_row:
                    self._count(line)
            except (ValueError, AttributeError, TypeError, RecursionError):
                is_of_row = False
            if not is_of_row:
                self._refuse(f"line {number} is not the answer to {row.location}: it was changed")
        if whole != raw:
            with writing(self.path, "--output"):
                os.truncate(self.path, len(whole))

    def _require_same(self) -> None:
        """Raise a UserError if the file was made from something else."""
        if not self.settings.exists():
            self._refuse(f"exists, but not {self.settings}, which says what it was made from")
        try:
            before = json.loads(read_regular(self.settings))["made_from"]
            changed = [name for name in self.made_from if before[name] != self.made_from[name]]
        except (ValueError, KeyError, TypeError):
            self._refuse(f"{self.settings} is damaged")
        if changed:
            self._refuse(f"was begun with another {' and another '.join(changed)}")

    def _refuse(self, problem: str) -> None:
        fix = f"To begin anew, delete {self.path}, or choose another --output"
        raise UserError(("--output", self.path), problem, fix)
