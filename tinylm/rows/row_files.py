"""Read rows: .jsonl, .json, .csv, .tsv, .parquet, SMSSpamCollection, a folder or glob of them,
or a Hugging Face dataset. The cells of a .csv or .tsv file are strings.

    `read_rows`   ─▶ (location, dict) of a split; location is FILE:LINE, or FILE: row N, for errors

Does not know what a row means; see columns.py. All rows of a split are kept in memory.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tinylm.common.errors import UserError
from tinylm.common.files import COMPRESSED_ENDS
from tinylm.config.schema import DataConfig
from tinylm.text.data_source import find_split
from tinylm.text.documents import file_rows, text_lines
from tinylm.text.hub_dataset import HubDataset
from tinylm.text.row_text import DOCUMENTS_ARE_FOR, is_blank, kind_of
from tinylm.text.sources import Kinds, Which, files_in

LocatedRow = tuple[str, dict[str, Any]]
"""where the row is, for errors, and the row"""

SMS_FILE = "SMSSpamCollection"
ROW_FILES: Kinds = (
    ".parquet",
    SMS_FILE,
    *(
        f"{kind}{end}"
        for kind in (".jsonl", ".json", ".csv", ".tsv")
        for end in ("", *COMPRESSED_ENDS)
    ),
)
# Prefixes of the file names of training splits, and of held-out splits: of these a test split is
# for the end, so it is preferred for evaluation, and a validation split for choosing.
TRAIN_FILES, TEST_FILES = ("train",), ("test", "validation", "val")
# Settings of documents that do not apply to rows.
UNUSED = {
    "mix",
    "token_dtype",
    "stride",
    "max_doc_len",
    "document_separator",
    "text_field",
    "shuffle_window",
}
# Used in place of a folder without rows, so that every command can be tried.
TINY_ROWS = "data/tiny_instructions.jsonl"


def read_rows(
    data: DataConfig, which: Which, seed: int, built_in: Sequence[LocatedRow] = ()
) -> Iterator[LocatedRow]:
    """The training or validation rows that `data` describes, each with its location; of the rows
    `built_in` in their place, if there are any.

    Equal rows are on the same side of the split, as equal documents are in pretraining.

    Raises:
        UserError: nothing is found, a row is not an object, or no row is in this split.
    """
    if built_in:
        return iter(split_built_in_rows(built_in, which))
    split = find_split(resolve_dataset(data)[0], which, seed, ROW_FILES)
    if isinstance(split.text_source, HubDataset):
        rows = split.text_source.rows()
    else:
        rows = (row for path in split.text_source.paths for row in _read_file(path))
    return split.select(
        map(_require_object, rows),
        lambda located: json.dumps(located[1], sort_keys=True, default=str),
        kind="rows",
    )


def split_built_in_rows(built_in: Sequence[LocatedRow], which: Which) -> list[LocatedRow]:
    """Every fourth of a few built-in rows for validation, the others for training: too few to
    split by a hash.
    """
    is_val = which == "val"
    return [row for position, row in enumerate(built_in) if (position % 4 == 3) == is_val]


def resolve_dataset(data: DataConfig) -> tuple[DataConfig, str | None]:
    """The settings with data.dataset as it is read,
    and a note for the user if that is something else.

    Raises:
        UserError: a setting does not apply to rows, or a folder has files of several splits.
    """
    for setting, value in data.model_dump(include=UNUSED).items():
        if value != DataConfig.model_fields[setting].default:
            raise UserError(
                f"data.{setting}",
                "does not apply to rows for fine-tuning",
                f"Remove it. {DOCUMENTS_ARE_FOR}",
            )
    if not os.path.isdir(data.dataset):
        return data, None
    dataset, note = folder_or_tiny_rows(data.dataset)
    return data.model_copy(update={"dataset": dataset}), note


def folder_or_tiny_rows(folder: str) -> tuple[str, str | None]:
    """The data set that a folder given as data.dataset means: itself, or the tiny rows and a note
    if it has no file of rows.
    """
    if files := files_in(folder, ROW_FILES):
        _require_one_split(folder, files)
        return folder, None
    names = f"{SMS_FILE}, instruction-data.json or any other file of rows"
    return TINY_ROWS, f"data.dataset: {folder} has no {names}; using {TINY_ROWS} instead"


def _require_one_split(folder: str, files: list[Path]) -> None:
    """Raise a UserError for a folder with a training and a test split:
    all of it would be trained on.
    """
    train = sorted(path for path in files if path.name.startswith(TRAIN_FILES))
    held_out = sorted(path for path in files if path.name.startswith(TEST_FILES))
    if not train or not held_out:
        return
    dataset = train[0] if len(train) == 1 else train[0].with_name("train*")
    # A test split is for the end, if there is a validation split.
    val_dataset = min(held_out, key=lambda path: path.name.startswith("test"))
    raise UserError(
        ("data.dataset", folder),
        f"has {dataset.name} and {val_dataset.name}, and every file of a folder is trained on",
        "Set {}={}, and {}={} to validate on that",
        "data.dataset",
        dataset,
        "data.val_dataset",
        val_dataset,
    )


def _require_object(located: tuple[object, Any]) -> LocatedRow:
    location, row = str(located[0]), located[1]
    if not isinstance(row, dict):
        example = '{"instruction": "...", "output": "..."}'
        problem = f"must be an object such as {example}, got {kind_of(row)}"
        raise UserError(location, problem, "Correct the row")
    return location, row


def _read_file(path: Path) -> Iterator[tuple[object, Any]]:
    return _sms_rows(path) if path.name.endswith(SMS_FILE) else file_rows(path)


def _sms_rows(path: Path) -> Iterator[tuple[object, Any]]:
    """The lines of the SMS Spam Collection (Almeida et al. 2011): ham or spam, a tab,
    the message.
    """
    for location, line in text_lines(path):
        if is_blank(line):
            continue
        label, tab, text = line.partition("\t")
        if not tab:
            problem = "must be ham or spam, a tab, and a message; there is no tab"
            raise UserError(str(location), problem, "Correct the line")
        yield location, {"label": label, "text": text}
