import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from tinylm.common.errors import UserError, printable
from tinylm.config.schema import DataConfig
from tinylm.text.documents import T
from tinylm.text.sources import (
    BIN,
    DOCUMENT_FILES,
    HubDataset,
    Kinds,
    LocalFiles,
    Source,
    find_source,
    is_token_file,
)

Which = Literal["train", "val"]


@dataclass(frozen=True)
class Split:
    """The training or the validation documents: a source, the share of it that is meant, and how many at most."""

    which: Which
    source: Source
    held_out: tuple[float, int] | None
    """fraction and seed of the validation documents, where both splits come from this source"""
    limit: int | None

    def documents(self) -> Iterator[str]:
        """The documents of the split.

        Raises:
            UserError: there are none.
        """
        return self.choose(self.source.documents(), lambda text: text)

    def choose(
        self, items: Iterable[T], text_of: Callable[[T], str], *, kind: str = "documents"
    ) -> Iterator[T]:
        """Those of all of the source's documents, or rows, that are in the split, told by their text.

        Raises:
            UserError: there are none.
        """
        read = kept = 0
        for item in items:
            read += 1
            if self.has(text_of(item)):
                kept += 1
                yield item
                if kept == self.limit:
                    return
        if not kept:
            raise self.nothing(read, kind)

    def has(self, text: str) -> bool:
        """Whether a document of the source is in this split, were it not for the limit."""
        return self.held_out is None or is_held_out(text, *self.held_out) == (self.which == "val")

    @property
    def label(self) -> str:
        """What an error calls the split: the source's name, and which of its documents are meant."""
        return (
            f"{printable(self.source.name)}: {'validation' if self.which == 'val' else 'training'}"
        )

    def nothing(self, read: int, kind: str = "documents") -> UserError:
        """The error to raise where none of the `read` documents, or rows, of the source is in the split."""
        name = printable(self.source.name)
        if not read or self.held_out is None:
            return UserError(
                f"{name}: no {kind}, only blank lines or nothing at all. Give a file with {'text' if kind == 'documents' else kind}."
            )
        counts = f"got 0 of {read} {kind} (data.val_fraction {self.held_out[0]})"
        return UserError(
            f"{self.label} {counts}. Give more {kind}, another data.val_fraction, or data.val_dataset."
        )


def is_held_out(text: str, fraction: float, seed: int) -> bool:
    """Whether a document is for validation: its hash, with the seed, falls into the first `fraction` of all hashes.

    Equal documents fall on the same side, and a stream needs no second look at what went before.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def find_split(data: DataConfig, which: Which, seed: int, kinds: Kinds = DOCUMENT_FILES) -> Split:
    """The training or validation split that `data` describes, in files of these kinds or on the hub; nothing of it is read yet."""
    key, name = named_source(data, which)
    if is_token_file(name):
        check_token_files(data)
        found = f"{printable(name)} is a token file, whose documents cannot be read again"
        raise UserError(
            f"data.{key}: {found}. Set tokenizer.path to the tokenizer that it was encoded with."
        )
    limit = data.train_docs if which == "train" else data.val_docs
    source = find_source(data, key, name, data.split, kinds)
    if data.val_dataset is None and data.val_split is None:
        if which == "val" and isinstance(source, HubDataset) and data.streaming and limit is None:
            raise UserError(
                "data.val_docs: holding documents out of a streamed dataset would read all of it. Set data.val_docs, for example 1000."
            )
        return Split(which, source, (data.val_fraction, seed), limit)
    if which == "val" and data.val_split is not None:
        source = find_source(data, key, name, data.val_split, kinds)
    if (
        which == "val"
        and isinstance(source, HubDataset)
        and source.name == data.dataset
        and source.split == data.split
    ):
        mend = (
            "Set data.val_split to another split, or leave it out."
            if key == "dataset"
            else "Give another dataset, or set data.val_split in its place."
        )
        raise UserError(
            f"data.{'val_split' if key == 'dataset' else key}: validation would be the training documents themselves. {mend}"
        )
    return Split(which, source, None, limit)


def named_source(data: DataConfig, which: Which) -> tuple[str, str]:
    """The setting that names the source of a split, and its value; of a mixture each part has its own."""
    if which == "val" and data.val_dataset is not None:
        return "val_dataset", data.val_dataset
    if data.mix is not None:
        raise ValueError("a mixture has several sources: mix_parts")
    return "dataset", data.dataset


def mix_parts(data: DataConfig) -> tuple[DataConfig, ...]:
    """Each source of data.mix as the settings of a run that has no other; the settings themselves where they have no mixture.

    A token file beside texts keeps none of the settings that are for those.
    """
    if data.mix is None:
        return (data,)
    for_text = {
        name: DataConfig.model_fields[name].default
        for name in ("text_field", "document_separator", "max_doc_len")
    }
    has_text = not all(is_token_file(part.dataset) for part in data.mix)
    bare_val = (data.val_dataset or "").endswith(
        BIN
    )  # its ids have the type that the settings say, whatever the part is
    dtypes = [
        data.token_dtype if bare_val or part.dataset.endswith(BIN) else None for part in data.mix
    ]
    alone = [
        {"mix": None, "dataset": part.dataset, "token_dtype": dtype}
        for part, dtype in zip(data.mix, dtypes, strict=True)
    ]
    return tuple(
        data.model_copy(
            update=one | (for_text if has_text and is_token_file(one["dataset"]) else {})
        )
        for one in alone
    )


def train_documents(data: DataConfig, seed: int, *, skip: int = 0) -> Iterator[str]:
    """The training documents in their order, without the first `skip`: a resumed stream goes on exactly there.

    Skipped documents are read, since only their text tells whether they are training documents, but not encoded.

    Raises:
        UserError: nothing is there, a row is no document, or no document is for training.
    """
    return islice(find_split(data, "train", seed).documents(), skip, None)


def shared_documents(data: DataConfig, seed: int) -> int:
    """How many different documents are in training and in validation: 0 where each source is split by its texts.

    Only files of text on this machine are compared; a hub dataset or a token file counts as sharing nothing.
    """
    parts = [part for part in mix_parts(data) if not is_token_file(part.dataset)]
    if not parts or data.val_dataset is None or is_token_file(data.val_dataset):
        return 0
    val, trains = (
        find_split(parts[0], "val", seed),
        [find_split(part, "train", seed) for part in parts],
    )
    local = [train for train in trains if isinstance(train.source, LocalFiles)]
    if not local or not isinstance(val.source, LocalFiles):
        return 0
    digests = {_digest(text) for text in val.documents()}
    return len(
        {
            digest
            for train in local
            for text in train.documents()
            if (digest := _digest(text)) in digests
        }
    )


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def check_token_files(data: DataConfig) -> None:
    """Raise a UserError where a token file is given together with a setting that only text can follow.

    Whichever split is asked for, all settings are looked at, so that a run says it before it trains.
    """
    if is_token_file(data.dataset):
        _refuse_set(
            data,
            "dataset",
            ("streaming", "dataset_config", "split", "val_split", "train_docs", "max_doc_len"),
        )
        if data.val_dataset is None or is_token_file(
            data.val_dataset
        ):  # or else they are for the validation text
            _refuse_set(data, "dataset", ("text_field", "document_separator"))
    key, name = named_source(data, "val")
    if is_token_file(name):
        _refuse_set(data, key, ("val_docs",))
    if (
        data.token_dtype is not None
        and not data.dataset.endswith(BIN)
        and not (data.val_dataset or "").endswith(BIN)
    ):
        raise UserError(
            "data.token_dtype: is for a bare .bin, and neither data.dataset nor data.val_dataset is one. Take it out."
        )


def _refuse_set(data: DataConfig, key: str, settings: Iterable[str]) -> None:
    """Raise a UserError for the first of `settings` that differs from its default."""
    values = data.model_dump(include=set(settings))
    for setting in settings:
        if values[setting] != DataConfig.model_fields[setting].default:
            raise UserError(
                f"data.{setting}: does not apply to the token file data.{key}. Take it out, or: {give_text(key)}"
            )


def give_text(key: str) -> str:
    """What to do about a token file that the user gave as data.`key`."""
    return f"Give the text that it was made from as data.{key}."
