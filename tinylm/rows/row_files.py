import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tinylm.common.errors import UserError, first_line, printable, reading, require_regular
from tinylm.config.schema import DataConfig
from tinylm.text.documents import is_blank, jsonl_rows, kind_of, parquet_rows, text_lines
from tinylm.text.sources import HubDataset, Kinds, files_in
from tinylm.text.splits import Which, find_split

LocatedRow = tuple[str, dict[str, Any]]

SMS_FILE = "SMSSpamCollection"
ROW_FILES: Kinds = (".jsonl", ".json", ".parquet", ".jsonl.gz", SMS_FILE)
# Settings of documents that rows have no use for.
UNUSED = {
    "mix",
    "token_dtype",
    "stride",
    "max_doc_len",
    "document_separator",
    "text_field",
    "shuffle_window",
}
# What a folder without rows stands for, as in S0, so that every command can be tried.
TINY_ROWS = "data/tiny_instructions.jsonl"
# Places of skipped rows that are named.
NAMED_PLACES = 3


def build_corpus_from_sources(folder: str) -> tuple[str, str | None]:
    """What a folder given as data.dataset is read as: itself, or the tiny rows and a note where it holds no file of rows."""
    if files := files_in(folder, ROW_FILES):
        _refuse_splits(folder, files)
        return folder, None
    found = f"data.dataset: {printable(folder)} holds neither {SMS_FILE} nor instruction-data.json, nor another file of rows"
    return TINY_ROWS, f"{found}; the tiny rows in {TINY_ROWS} are used"


def _refuse_splits(folder: str, files: list[Path]) -> None:
    """Refuse a folder that has a test split beside the training split: it would be trained on whole."""
    train, other = (
        sorted(path for path in files if path.name.startswith(names))
        for names in (TRAIN_FILES, TEST_FILES)
    )
    if train and other:
        given = train[0] if len(train) == 1 else train[0].with_name("train*")
        apart = min(
            other, key=lambda path: path.name.startswith("test")
        )  # which is for the end, where there is a validation split
        found = f"{printable(folder)} holds {printable(given.name)} and {printable(apart.name)}, and every file of a folder is trained on"
        raise UserError(
            f"data.dataset: {found}. Set data.dataset={printable(given)}, and data.val_dataset={printable(apart)} to validate on that."
        )


def resolve_dataset(data: DataConfig) -> tuple[DataConfig, str | None]:
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


def read_rows(data: DataConfig, which: Which, seed: int) -> Iterator[LocatedRow]:
    """The training or validation rows that `data` describes, each with the place that an error calls it by.

    Equal rows fall on the same side, as equal documents do in corpus.py, whose settings mean the same here.

    Raises:
        UserError: nothing is there, a row is no object, or no row is in this split.
    """
    split = find_split(resolve_dataset(data)[0], which, seed, ROW_FILES)
    rows = (
        split.source.rows()
        if isinstance(split.source, HubDataset)
        else (row for path in split.source.paths for row in _file_rows(path))
    )
    return split.choose(
        map(_record, rows),
        lambda record: json.dumps(record[1], sort_keys=True, default=str),
        kind="rows",
    )


def split_built_in_rows(built_in: Sequence[LocatedRow], which: Which) -> list[LocatedRow]:
    """Of rows that a program brings, too few to be told by their content, every fourth for validation and the others for training."""
    return [record for place, record in enumerate(built_in) if (place % 4 == 3) == (which == "val")]


def _record(row: tuple[object, Any]) -> LocatedRow:
    place = str(row[0])
    if not isinstance(row[1], dict):
        raise UserError(
            f'{place}: expected an object such as {{"instruction": "...", "output": "..."}}, found {kind_of(row[1])}. Correct the row.'
        )
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
        raise UserError(
            f"{printable(path)}: not UTF-8 text (byte {error.start}). Save the file as UTF-8."
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{printable(path)}: not JSON: {first_line(error)}. Correct the file; one object a line is .jsonl."
        ) from None
    if not isinstance(rows, list):
        raise UserError(
            f"{printable(path)}: expected a list of objects, found {kind_of(rows)}. Write [{{...}}, {{...}}], or one object a line as .jsonl."
        )
    yield from (
        (f"{printable(path)}: row {number}", row) for number, row in enumerate(rows, start=1)
    )


def _sms_rows(path: Path) -> Iterator[tuple[object, Any]]:
    """The lines of the SMS Spam Collection (Almeida et al. 2011): ham or spam, a tab, the message."""
    for place, line in text_lines(path):
        if is_blank(line):
            continue
        label, tab, text = line.partition("\t")
        if not tab:
            raise UserError(
                f"{place}: expected ham or spam, a tab, and a message; there is no tab. Correct the line."
            )
        yield place, {"label": label, "text": text}


# How the names of files begin that are for training, and of those that are not; for an evaluation the best first: a validation split
# is for choosing, a test split for the end.
TRAIN_FILES, TEST_FILES = ("train",), ("test", "validation", "val")
