r"""Rows of fine-tuning data: where they come from, what conversation each one is, and the examples they become.

    1. records      .jsonl, .json, .parquet, SMSSpamCollection, a folder or glob of them, or a Hugging Face dataset
                    ─▶ (place, dict), split into training and validation by content                  `records`
    2. conversation a dict ─▶ turns, told by its keys                                                `conversation_of`
                        {"instruction", "input", "output"}       alpaca; the input may be missing or empty
                        {"prompt", "completion"}                 prompt; also question, and response, answer or target
                        {"messages": [{"role", "content"}]}      messages
                        {"conversations": [{"from", "value"}]}   sharegpt; the turns may have either pair of keys
                        {"label", "text"}                        a line of SMSSpamCollection
    3. examples     a conversation ─▶ tokens and targets, cut to the context                         `examples`
    4. pairs        for preferences, in place of 2 and 3: a dict ─▶ a prompt and two answers         `preference_of`
                        {"instruction", "input", "chosen", "rejected"}, {"prompt", "chosen", "rejected"}
                        {"chosen", "rejected"}, each a whole conversation: messages, or text as Anthropic's hh-rlhf has it
                    ─▶ two examples that differ in their answers                                     `pairs`

A row that is none of these is an error that names its file, line and key. A row is held in memory, as are all examples:
fine-tuning data are small. How turns are written is prompts.py's business, how examples fill rows packing.py's.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from tinylm.config import DataConfig
from tinylm.corpus import HubDataset, Kinds, Which, files_in, find_split, is_blank, jsonl_rows, kind_of, parquet_rows, some_of, text_lines
from tinylm.errors import UserError, printable, reading, require_regular
from tinylm.packing import Example
from tinylm.prompts import Conversation, Role, Template, Turn
from tinylm.tokenizer import Tokenizer, first_line

Record = tuple[str, dict[str, Any]]

SMS_FILE = "SMSSpamCollection"
ROW_FILES: Kinds = (".jsonl", ".json", ".parquet", ".jsonl.gz", SMS_FILE)
# Settings of documents that rows have no use for.
UNUSED = {"mix", "token_dtype", "stride", "max_doc_len", "document_separator", "text_field", "shuffle_window"}
# How the names of files begin that are for training, and of those that are not; for an evaluation the best first: a validation split
# is for choosing, a test split for the end.
TRAIN_FILES, TEST_FILES = ("train",), ("test", "validation", "val")
# What a folder without rows stands for, as in S0, so that every command can be tried.
TINY_ROWS = "data/tiny_instructions.jsonl"
# Places of skipped rows that are named.
NAMED_PLACES = 3


# --- step 1: records --------------------------------------------------------------------------------------------------


def build_corpus_from_sources(folder: str) -> tuple[str, str | None]:
    """What a folder given as data.dataset is read as: itself, or the tiny rows and a note where it holds no file of rows."""
    if files := files_in(folder, ROW_FILES):
        _refuse_splits(folder, files)
        return folder, None
    found = f"data.dataset: {printable(folder)} holds neither {SMS_FILE} nor instruction-data.json, nor another file of rows"
    return TINY_ROWS, f"{found}; the tiny rows in {TINY_ROWS} are used"


def _refuse_splits(folder: str, files: list[Path]) -> None:
    """Refuse a folder that has a test split beside the training split: it would be trained on whole."""
    train, other = (sorted(path for path in files if path.name.startswith(names)) for names in (TRAIN_FILES, TEST_FILES))
    if train and other:
        given = train[0] if len(train) == 1 else train[0].with_name("train*")
        apart = min(other, key=lambda path: path.name.startswith("test"))  # which is for the end, where there is a validation split
        found = f"{printable(folder)} holds {printable(given.name)} and {printable(apart.name)}, and every file of a folder is trained on"
        raise UserError(f"data.dataset: {found}. Set data.dataset={printable(given)}, and data.val_dataset={printable(apart)} to validate on that.")


def with_rows(data: DataConfig) -> tuple[DataConfig, str | None]:
    """The settings with data.dataset as it is read, and a note for the user where that is not what it says.

    Raises:
        UserError: a setting is given that rows of fine-tuning have no use for, or a folder has files of several splits.
    """
    for setting, value in data.model_dump(include=UNUSED).items():
        if value != DataConfig.model_fields[setting].default:
            raise UserError(f"data.{setting}: rows of fine-tuning have no use for it. Take it out.")
    if not os.path.isdir(data.dataset):
        return data, None
    name, note = build_corpus_from_sources(data.dataset)
    return data.model_copy(update={"dataset": name}), note


def records(data: DataConfig, which: Which, seed: int) -> Iterator[Record]:
    """The training or validation rows that `data` describes, each with the place that an error calls it by.

    Equal rows fall on the same side, as equal documents do in corpus.py, whose settings mean the same here.

    Raises:
        UserError: nothing is there, a row is no object, or no row is in this split.
    """
    split = find_split(with_rows(data)[0], which, seed, ROW_FILES)
    rows = split.source.rows() if isinstance(split.source, HubDataset) else (row for path in split.source.paths for row in _file_rows(path))
    return split.choose(map(_record, rows), lambda record: json.dumps(record[1], sort_keys=True, default=str), kind="rows")


def built_in_split(built_in: Sequence[Record], which: Which) -> list[Record]:
    """Of rows that a program brings, too few to be told by their content, every fourth for validation and the others for training."""
    return [record for place, record in enumerate(built_in) if (place % 4 == 3) == (which == "val")]


def _record(row: tuple[object, Any]) -> Record:
    place = str(row[0])
    if not isinstance(row[1], dict):
        raise UserError(f'{place}: expected an object such as {{"instruction": "...", "output": "..."}}, found {kind_of(row[1])}. Correct the row.')
    return place, row[1]


def _file_rows(path: Path) -> Iterator[tuple[object, Any]]:
    require_regular(path)
    if path.name.endswith(".parquet"):
        return parquet_rows(path)
    if path.name.endswith(".json"):
        return _json_rows(path)
    return _sms_rows(path) if path.name.endswith(SMS_FILE) else jsonl_rows(path)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The items of the list in a .json file."""
    with reading(path):
        raw = path.read_bytes()
    try:
        rows = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{printable(path)}: not UTF-8 text (byte {error.start}). Save the file as UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{printable(path)}: not JSON: {first_line(error)}. Correct the file; one object a line is .jsonl.") from None
    if not isinstance(rows, list):
        raise UserError(f"{printable(path)}: expected a list of objects, found {kind_of(rows)}. Write [{{...}}, {{...}}], or one object a line as .jsonl.")
    yield from ((f"{printable(path)}: row {number}", row) for number, row in enumerate(rows, start=1))


def _sms_rows(path: Path) -> Iterator[tuple[object, Any]]:
    """The lines of the SMS Spam Collection (Almeida et al. 2011): ham or spam, a tab, the message."""
    for place, line in text_lines(path):
        if is_blank(line):
            continue
        label, tab, text = line.partition("\t")
        if not tab:
            raise UserError(f"{place}: expected ham or spam, a tab, and a message; there is no tab. Correct the line.")
        yield place, {"label": label, "text": text}


# --- step 2: conversations --------------------------------------------------------------------------------------------

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
_SIGNS: dict[str, Kind] = {"messages": "messages", "conversations": "sharegpt", "instruction": "alpaca", "prompt": "prompt"}
_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
SMS_INSTRUCTION = "classify if the SMS is spam or ham"


def conversation_of(row: dict[str, Any], data: DataConfig) -> Conversation:
    """The conversation in a row, of the kind that data.rows says or that its keys tell.

    Raises:
        UserError: naming the key and what is wrong: it is missing, null, of another type or empty, or a role is unknown.
    """
    columns = _Columns(row, data.columns or {})
    match _kind_of_row(columns) if data.rows == "auto" else data.rows:
        case "alpaca":
            return Turn("user", columns.text("instruction"), columns.optional_text("input")), Turn("assistant", columns.text("output"))
        case "prompt":
            return Turn("user", columns.text("prompt")), Turn("assistant", columns.text("completion"))
        case "messages":
            return _turns(columns, "messages")
        case "sharegpt":
            return _turns(columns, "conversations")
        case _:
            return _sms_conversation(row)


def texts_left_out(row: dict[str, Any], data: DataConfig) -> list[str]:
    """The columns with text that `conversation_of` makes no turn of: perhaps a question lacks what stands there."""
    columns = _Columns(row, data.columns or {})
    kind = _kind_of_row(columns) if data.rows == "auto" else data.rows
    read = {"label", "text"} if kind == "sms" else {columns.find(ours) for ours in _READ[kind]}
    return [name for name, value in row.items() if name not in read and isinstance(value, str) and not is_blank(value)]


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
            raise UserError(f"{wanted}: missing; the row has {some_of(self.row)}. Add it, or set data.columns: {{{ours}: its name in the data}}.")
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
        return "" if value is None or (isinstance(value, str) and is_blank(value)) else _text(name, value)


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{printable(key)}: expected a string, found {kind_of(value)}. Correct the row, or take it out.")
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
    raise UserError(f"expected {known}; the row has {some_of(columns.row)}. Name its columns, for example data.columns: {{prompt: question}}.")


def _sms_conversation(row: dict[str, Any]) -> Conversation:
    """S0's triplet of a message."""
    label = _text("label", row["label"])
    if label not in ("ham", "spam"):
        raise UserError(f"label: expected ham or spam, found {printable(label)}. Correct the row, or take it out.")
    return Turn("user", SMS_INSTRUCTION, _text("text", row["text"])), Turn("assistant", label)


def _turns(columns: _Columns, ours: str) -> Conversation:
    """The turns in a list of objects, at least one of them the assistant's."""
    name, items = columns.value(ours)
    if not isinstance(items, list):
        raise UserError(f"{printable(name)}: expected a list of turns, found {kind_of(items)}. Correct the row, or set data.rows.")
    turns = _turns_in(name, items)
    if not any(turn.role == "assistant" for turn in turns):
        raise UserError(f"{printable(name)}: no turn of the assistant among {len(turns)}. Add an answer, or take the row out.")
    return turns


def _turns_in(name: str, items: list[Any]) -> Conversation:
    return tuple(_turn(item, f"{printable(name)}[{number}]") for number, item in enumerate(items))


def _keys_of_turn(item: dict[str, Any]) -> tuple[str, str]:
    """What a turn calls its side and its text: ShareGPT's words or OpenAI's, whatever the column is called."""
    return ("from", "value") if item.get("role") is None and "from" in item else ("role", "content")


def _turn(item: Any, where: str) -> Turn:
    if not isinstance(item, dict):
        raise UserError(f"{where}: expected an object with role and content, found {kind_of(item)}. Correct the row.")
    role_key, text_key = _keys_of_turn(item)
    for key in (role_key, text_key):
        if key not in item:
            raise UserError(f"{where}.{key}: missing; the turn has {some_of(item)}. Add it, or take the row out.")
    role = item[role_key]
    if not isinstance(role, str) or role not in _ROLES:
        found = printable(role) if isinstance(role, str) else kind_of(role)
        raise UserError(f"{where}.{role_key}: expected {', '.join(_ROLES)}, found {found}. Correct the row, or take it out.")
    return Turn(_ROLES[role], _text(f"{where}.{text_key}", item[text_key]))


# --- step 3: examples -------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What became of the rows of a split."""

    which: Which
    seq_len: int
    kept: int = 0
    cut: int = 0
    """of those kept, how many lost the end of an answer"""
    skipped: int = 0
    places: list[str] = field(default_factory=list)
    """where the first skipped rows stand"""
    left_out: dict[str, None] = field(default_factory=dict)
    """columns with text that is in no turn, in their order"""

    @property
    def skipped_rows(self) -> str:
        """The skipped rows in words: how many, why, and the first of them by name."""
        more = ", ..." if self.skipped > len(self.places) else ""
        return f"{self.skipped} rows whose prompts fill the context of {self.seq_len} tokens ({', '.join(self.places)}{more})"

    @property
    def name(self) -> str:
        """The split in words."""
        return "validation" if self.which == "val" else "training"

    def notes(self) -> list[str]:
        """What a user should know of it, a line each."""
        notes = [f"{self.name}: skipped {self.skipped_rows}"] if self.skipped else []
        if self.left_out:
            notes.append(f"{self.name}: columns that are not read: {some_of(self.left_out)}; data.columns names those that are")
        return notes + ([f"{self.name}: {self.cut} of {self.kept} rows lost the end of an answer to the context of {self.seq_len} tokens"] if self.cut else [])


def examples(
    data: DataConfig,
    which: Which,
    seed: int,
    template: Template,
    tokenizer: Tokenizer,
    seq_len: int,
    *,
    train_on: Literal["response", "all"],
    conversation_of: Callable[[dict[str, Any]], Conversation] | None = None,
    built_in: Sequence[Record] = (),
) -> tuple[list[Example], Report]:
    """The examples of a split in the order of its rows, each of at most seq_len inputs, and what was cut and left out.

    Args:
        data: where the rows are.
        which: training or validation.
        seed: decides which rows are held out.
        template: how their conversations are written.
        tokenizer: what they are encoded with.
        seq_len: inputs that a row of a batch has room for.
        train_on: the responses, or every token but the first of an example.
        conversation_of: what makes a conversation of a row; None: its keys tell, or data.rows.
        built_in: rows in place of those that `data` names.

    Raises:
        UserError: as `records`; a row is no conversation; or the prompt of every row fills the context.
    """
    to_conversation = conversation_of or _told_by_keys(data)
    kept: list[Example] = []
    report = Report(which, seq_len)
    for place, row in built_in_split(built_in, which) if built_in else records(data, which, seed):
        try:
            whole = template.encode(to_conversation(row), tokenizer)
        except UserError as problem:
            raise UserError(f"{place}: {problem}") from None
        trained = whole.trained if train_on == "response" else np.arange(len(whole.ids)) > 0
        if conversation_of is None:
            report.left_out |= dict.fromkeys(texts_left_out(row, data))
        # The last token of a row is only a target.
        example = Example(whole.ids[: seq_len + 1], trained[: seq_len + 1], place)
        if example.trained.any():
            kept.append(example)
            report.cut += len(whole.ids) > len(example.ids)
        else:
            report.skipped += 1
            report.places += [place] * (report.skipped <= NAMED_PLACES)
    report.kept = len(kept)
    if not kept:
        found = f"{report.name}: nothing is left without {report.skipped_rows}"
        raise UserError(f"data.dataset: {found}. Raise training.seq_len, or shorten the prompts.")
    return kept, report


def _told_by_keys(data: DataConfig) -> Callable[[dict[str, Any]], Conversation]:
    return lambda row: conversation_of(row, data)


def shared_examples(train: list[Example], val: list[Example]) -> int:
    """How many examples of `val` are in `train` too, token for token."""
    seen = {example.ids.tobytes() for example in train}
    return sum(example.ids.tobytes() in seen for example in val)


def shared_questions(train: list[Example], val: list[Example]) -> int:
    """How many examples of `val` ask what one of `train` asks, whatever the answers: all before the first target is equal."""
    seen = {_asked(example) for example in train}
    return sum(_asked(example) in seen for example in val)


def _asked(example: Example) -> bytes:
    return example.ids[: int(example.trained.argmax())].tobytes()


# --- step 4: pairs of answers -----------------------------------------------------------------------------------------

# How Anthropic's hh-rlhf writes its turns.
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class Preference(NamedTuple):
    """A question, and two answers of which the first is better."""

    prompt: Conversation
    chosen: str
    rejected: str


class Pair(NamedTuple):
    """A preference as tokens: the same prompt twice, and only what is answered to it is trained."""

    chosen: Example
    rejected: Example
    reference: Sequence[float] | None = None
    """log p of both answers under the reference model, where they are known before training"""


class _NoPair(Exception):
    """A row that sound data may have, and that says nothing of which answer is better; the message says what is wrong with such rows."""


def preference_of(row: dict[str, Any], data: DataConfig) -> Preference:
    """The prompt and the two answers in a row, told by its keys; an answer that is null is empty.

    Raises:
        UserError: naming the key and what is wrong.
    """
    columns = _Columns(row, data.columns or {})
    (chosen_name, chosen), (rejected_name, rejected) = columns.value("chosen"), columns.value("rejected")
    if isinstance(chosen, list) or isinstance(rejected, list):
        told, better = _told_and_answer(chosen_name, chosen)
        other, worse = _told_and_answer(rejected_name, rejected)
        if told != other:
            raise _NoPair("conversations that part before the last answer")
        return Preference(told or _prompt_of(columns), better, worse)
    better, worse = _answer(chosen_name, chosen), _answer(rejected_name, rejected)
    if columns.find("instruction") is None and columns.find("prompt") is None:
        return _of_dialogues(better, worse)
    return Preference(_prompt_of(columns), better, worse)


def _prompt_of(columns: _Columns) -> Conversation:
    """What is asked, where it stands apart from the answers."""
    if columns.find("instruction") is not None:
        return (Turn("user", columns.text("instruction"), columns.optional_text("input")),)
    name, prompt = columns.value("prompt")
    if not isinstance(prompt, list):
        return (Turn("user", _text(name, prompt)),)
    return _ends_with_question(name, _turns_in(name, prompt))


def _told_and_answer(name: str, items: Any) -> tuple[Conversation, str]:
    """The turns of a list before its last, and the text of that, which is the assistant's and may be empty."""
    if not isinstance(items, list) or not items:
        found = "no turn" if items == [] else kind_of(items)
        raise UserError(f"{printable(name)}: expected a list of turns, found {found}. Write both answers as text, or both as lists of turns.")
    where = f"{printable(name)}[{len(items) - 1}]"
    last = items[-1]
    text_key = _keys_of_turn(last)[1] if isinstance(last, dict) else ""
    empty = isinstance(last, dict) and (last.get(text_key) is None or is_blank(str(last[text_key])))
    answer = _turn({**last, text_key: "-"} if empty else last, where)
    if answer.role != "assistant":
        raise UserError(f"{where}.role: the last turn is the {answer.role}'s, and it should be an answer. Add it, or take the row out.")
    told = _turns_in(name, items[:-1])
    return (_ends_with_question(name, told) if told else told), "" if empty else answer.text


def _ends_with_question(name: str, turns: Conversation) -> Conversation:
    if not turns or turns[-1].role != "user":
        raise UserError(f"{printable(name)}: the answer follows on no turn of the user. Add the question, or take the row out.")
    return turns


def _answer(name: str, value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise UserError(f"{printable(name)}: expected a string, found {kind_of(value)}. Correct the row, or take it out.")
    return value or ""


def _of_dialogues(chosen: str, rejected: str) -> Preference:
    r"""What two dialogues have in common up to an answer, and how each goes on.

    >>> _of_dialogues("\n\nHuman: 2+2?\n\nAssistant: 4", "\n\nHuman: 2+2?\n\nAssistant: 5").chosen
    '4'
    """
    common = len(os.path.commonprefix([chosen, rejected]))
    start = chosen.rfind(_ASSISTANT, 0, common)
    if start < 0:
        form = '"\\n\\nHuman: ...\\n\\nAssistant: ..."'
        raise UserError(f"chosen, rejected: no prompt beside them, and as dialogues ({form}) they have no question in common. Add prompt, or correct the row.")
    start += len(_ASSISTANT)
    if _HUMAN in chosen[start:] or _HUMAN in rejected[start:]:
        raise _NoPair("conversations that part before the last answer")
    prompt = _turns_of_dialogue(chosen[: start - len(_ASSISTANT)])
    return Preference(_ends_with_question("chosen", prompt), chosen[start:].strip(), rejected[start:].strip())


def _turns_of_dialogue(text: str) -> Conversation:
    """The turns of a dialogue; several of one side in a row are one."""
    turns: list[Turn] = []
    for piece in text.replace(_ASSISTANT, f"{_HUMAN}{_ASSISTANT}").split(_HUMAN)[1:]:
        role: Role = "assistant" if piece.startswith(_ASSISTANT) else "user"
        said = piece.removeprefix(_ASSISTANT).strip()
        if said and turns and turns[-1].role == role:
            turns[-1] = Turn(role, f"{turns[-1].text}\n\n{said}")
        elif said:
            turns.append(Turn(role, said))
    return tuple(turns)


@dataclass
class PairReport:
    """What became of the preference rows of a split."""

    which: Which
    seq_len: int
    kept: int = 0
    cut: int = 0
    """of those kept, in how many an answer lost its end"""
    skipped: dict[str, list[str]] = field(default_factory=dict)
    """what is wrong with rows that were left out: where they stand"""

    @property
    def name(self) -> str:
        """The split in words."""
        return "validation" if self.which == "val" else "training"

    @property
    def skipped_rows(self) -> str:
        """The skipped rows in words."""
        named = {why: places[:NAMED_PLACES] + ["..."] * (len(places) > NAMED_PLACES) for why, places in self.skipped.items()}
        return ", ".join(f"{len(places)} rows with {why} ({', '.join(named[why])})" for why, places in self.skipped.items())

    def notes(self) -> list[str]:
        """What a user should know of it, a line each."""
        notes = [f"warning: {self.name}: skipped {self.skipped_rows}"] if self.skipped else []
        return notes + ([f"{self.name}: in {self.cut} of {self.kept} pairs the context of {self.seq_len} tokens cut the end of an answer"] if self.cut else [])


def pairs(data: DataConfig, which: Which, seed: int, template: Template, tokenizer: Tokenizer, seq_len: int) -> tuple[list[Pair], PairReport]:
    """The preferences of a split in the order of its rows, both answers cut to seq_len inputs, and what was cut and left out.

    Rows with an empty answer, or with answers that are equal, are left out: they say nothing, and there are some in published data.

    Raises:
        UserError: as `records` and `preference_of`; or no row is left.
    """
    kept: list[Pair] = []
    report = PairReport(which, seq_len)
    for place, row in records(data, which, seed):
        try:
            pair = _pair(preference_of(row, data), template, tokenizer, seq_len, place)
        except UserError as problem:
            raise UserError(f"{place}: {problem}") from None
        except _NoPair as why:
            report.skipped.setdefault(str(why), []).append(place)
            continue
        report.cut += any(len(example.ids) > seq_len + 1 for example in pair[:2])
        kept.append(_cut(pair, seq_len))
    report.kept = len(kept)
    if not kept:
        mend = "Give pairs of which one answer is better, or raise training.seq_len"
        raise UserError(f"data.dataset: {report.name}: nothing is left without {report.skipped_rows}. {mend}.")
    return kept, report


def _pair(preference: Preference, template: Template, tokenizer: Tokenizer, seq_len: int, place: str) -> Pair:
    """The tokens of a preference, not cut yet."""
    if is_blank(preference.chosen) or is_blank(preference.rejected):
        raise _NoPair("an empty answer")
    if preference.chosen == preference.rejected:
        raise _NoPair("two equal answers")
    asked = len(template.prompt_ids(preference.prompt, tokenizer))
    if asked > seq_len:
        raise _NoPair(f"a prompt that fills the context of {seq_len} tokens")
    examples = []
    for answer in (preference.chosen, preference.rejected):
        whole = template.encode((*preference.prompt, Turn("assistant", answer)), tokenizer)
        # Answers that were given before belong to the prompt.
        examples.append(Example(whole.ids, whole.trained & (np.arange(len(whole.ids)) >= asked), place))
    pair = Pair(*examples)
    if np.array_equal(*(example.ids[: seq_len + 1] for example in examples)):
        raise _NoPair(f"answers that differ only behind the context of {seq_len} tokens")
    return pair


def _cut(pair: Pair, seq_len: int) -> Pair:
    """The last token of a row is only a target."""
    return Pair(*(Example(example.ids[: seq_len + 1], example.trained[: seq_len + 1], example.place) for example in pair[:2]))
