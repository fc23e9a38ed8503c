"""The data of a run, resolved: each setting that names data becomes a `DataSource`,
and nothing asks again what it is.

    data.dataset, data.mix, data.val_dataset ─▶ `data_sources` ─▶ DataSource: text to encode, or encoded tokens

One source is the mixture of one. The files of a source are found here and looked at, and not read
yet.
"""

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

# text.hub_dataset is imported when a source is on the hub
from tinylm import text
from tinylm.common.errors import UserError, not_found, require_optional
from tinylm.common.files import require_regular
from tinylm.common.hub import is_hub_name
from tinylm.config.schema import DataConfig
from tinylm.text.sources import (
    BIN,
    DOCUMENT_FILES,
    NPY,
    TOKEN_FILES,
    Kinds,
    LocalFiles,
    Split,
    Which,
    find_files,
)

# data.dataset_config, data.split and data.val_split of files on this machine.
NO_HUB = (None, "train", None)


@dataclass(frozen=True)
class DataSource:
    """One source of the training or validation data: text, or a token file that the user gave."""

    which: Which
    setting: str
    """the setting that names it, `data.mix[1].dataset`"""
    name: str
    """the value of the setting"""
    split: Split | None
    """the documents, if it is text; None for a token file"""
    text_field: str
    separator: str | None
    max_doc_len: int | None
    token_dtype: str | None
    """the type of the numbers in a bare .bin"""
    val_fraction: float | None
    """the share at the end of a token file that is for validation;
    None if validation has its own data"""

    def text_split(self) -> Split:
        """The documents.

        Raises:
            UserError: it is a token file.
        """
        if self.split is None:
            raise UserError(
                self.setting,
                f"{self.name} is a token file, whose documents cannot be read again",
                "Set tokenizer.path to the tokenizer that it was encoded with",
            )
        return self.split


def data_sources(
    data: DataConfig, which: Which, seed: int, kinds: Kinds = DOCUMENT_FILES
) -> tuple[DataSource, ...]:
    """The sources of a split: data.val_dataset for validation if it is set,
    else data.dataset or each part of data.mix.

    Args:
        data: the settings.
        which: the split.
        seed: decides which documents are held out.
        kinds: the files to find, documents or rows.

    Raises:
        UserError: nothing is there, a file cannot be read or is not what its name says, a package
            is not installed, or a setting does not apply to a source.
    """
    named = [("data.dataset", data.dataset)]
    if data.mix is not None:
        named = [(f"data.mix[{i}].dataset", part.dataset) for i, part in enumerate(data.mix)]
    all_tokens = all(name.endswith(TOKEN_FILES) for _, name in named)
    for setting, name in named:
        if name.endswith(TOKEN_FILES):
            _check_token_file(data, setting, all_tokens)
    val = data.val_dataset
    if val is not None and val.endswith(TOKEN_FILES):
        _refuse_settings(data, "data.val_dataset", ("val_docs",))
    bare = [name for name in (data.dataset, val) if name and name.endswith((BIN, NPY))]
    if data.mix is None and data.token_dtype is not None and not bare:
        problem = (
            "only valid for a bare .bin or .npy; neither data.dataset nor data.val_dataset is one"
        )
        raise UserError("data.token_dtype", problem, "Remove it")
    if which == "val" and val is not None:
        named = [("data.val_dataset", val)]
    sources = []
    for setting, name in named:
        split = None
        if name.endswith(TOKEN_FILES):
            require_regular(name)
        else:
            split = _text_split(data, which, seed, setting, name, kinds)
        source = DataSource(
            which=which,
            setting=setting,
            name=name,
            split=split,
            text_field=data.text_field,
            separator=data.document_separator,
            max_doc_len=data.max_doc_len,
            token_dtype=data.token_dtype,
            val_fraction=data.val_fraction if val is None else None,
        )
        sources.append(source)
    return tuple(sources)


def find_split(data: DataConfig, which: Which, seed: int, kinds: Kinds = DOCUMENT_FILES) -> Split:
    """The documents, or rows, of a split that has one source.

    Raises:
        UserError: as `data_sources`, or the source is a token file.
    """
    (source,) = data_sources(data, which, seed, kinds)
    return source.text_split()


def train_documents(data: DataConfig, seed: int, *, skip: int = 0) -> Iterator[str]:
    """The training documents in order, without the first `skip`:
    a resumed stream continues exactly there.

    Skipped documents are read, since only their text tells whether they are training documents,
    but not encoded.

    Raises:
        UserError: nothing is there, a row is not a document, or no document is for training.
    """
    return islice(find_split(data, "train", seed).documents(), skip, None)


def _text_split(
    data: DataConfig, which: Which, seed: int, setting: str, name: str, kinds: Kinds
) -> Split:
    """The documents of a source that is text: files of these kinds on this machine,
    or else a dataset on the hub.

    data.dataset_config belongs to data.dataset: a val_dataset on the hub is read
    in its default configuration.
    """
    own_split = which == "val" and data.val_split is not None
    hub_split = data.val_split if own_split else data.split
    config = data.dataset_config if setting != "data.val_dataset" else None
    limit = data.train_docs if which == "train" else data.val_docs
    held_out = None
    if data.val_dataset is None and data.val_split is None:
        held_out = (data.val_fraction, seed)
    # 1. on this machine
    if os.path.lexists(name) or glob.has_magic(name):
        if setting != "data.val_dataset" and (config, data.split, data.val_split) != NO_HUB:
            problem = f"{name} is on this machine, where files have no splits"
            raise UserError(setting, problem, "Remove split, val_split and dataset_config")
        paths = find_files(name, setting, kinds)
        files = LocalFiles(name, paths, data.text_field, data.document_separator)
        return Split(which, files, held_out, limit)
    # 2. on the hub
    suffixes = (*kinds, *DOCUMENT_FILES, *TOKEN_FILES)
    if not is_hub_name(name) or "/" not in name or name.endswith(suffixes):
        fix = "Give a file, a folder, a glob, or a Hugging Face name written owner/name"
        raise UserError((setting, name), not_found(name), fix)
    if held_out is not None and which == "val" and data.streaming and limit is None:
        problem = "holding documents out of a streamed dataset would read all of it"
        raise UserError("data.val_docs", problem, "Set data.val_docs, for example 1000")
    if held_out is None and which == "val" and (name, hub_split) == (data.dataset, data.split):
        problem = "validation would be the training documents themselves"
        if setting == "data.val_dataset":
            fix = "Give another dataset, or set data.val_split instead"
            raise UserError(setting, problem, fix)
        fix = "Set data.val_split to another split, or remove it"
        raise UserError("data.val_split", problem, fix)
    require_optional("datasets", name)
    field = data.text_field if kinds is DOCUMENT_FILES else None
    dataset = text.hub_dataset.HubDataset(
        name, config, hub_split, data.streaming, field, setting=setting
    )
    return Split(which, dataset, held_out, limit)


def _check_token_file(data: DataConfig, setting: str, all_tokens: bool) -> None:
    """Raise a UserError for a setting that only applies to text;
    in a mixture with text it is for the text.
    """
    _refuse_settings(
        data, setting, ("streaming", "dataset_config", "split", "val_split", "train_docs")
    )
    if all_tokens:
        _refuse_settings(data, setting, ("max_doc_len",))
        if data.val_dataset is None or data.val_dataset.endswith(TOKEN_FILES):
            _refuse_settings(data, setting, ("text_field", "document_separator"))
    if data.val_dataset is None:
        _refuse_settings(data, setting, ("val_docs",))


def _refuse_settings(data: DataConfig, key: str, settings: Iterable[str]) -> None:
    """Raise a UserError for the first of `settings` that is not its default."""
    values = data.model_dump(include=set(settings))
    for setting in settings:
        if values[setting] != DataConfig.model_fields[setting].default:
            problem = f"does not apply to the token file {key}"
            raise UserError(f"data.{setting}", problem, f"Remove it, or: {give_text(key)}")


def give_text(setting: str) -> str:
    """The fix for a token file that the user gave as `setting`."""
    return f"Give the text that it was made from as {setting}"
